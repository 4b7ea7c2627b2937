// How much memory a model may take.
#pragma once

#include <cstdint>
#include <string>

namespace recycle {

// Bytes that this process can still allocate without swapping: the machine's available memory, and what the process's
// control groups leave. Page cache that the system would give up counts as available. -1: the system does not say.
// root: where /proc and /sys are, for tests.
int64_t available_memory(const std::string& root = "");

}  // namespace recycle
