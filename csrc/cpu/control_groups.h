// The control groups (version 1 or 2) that this process is in: a container's limits.
#pragma once

#include <functional>
#include <string>

namespace recycle {

// visit(folder) for the group of this process that `controller` ("cpu", "memory") limits, and for each group above:
// each has a limit too. root: where /proc and /sys are, for tests.
void for_each_control_group(const std::string& controller, const std::string& root,
                            const std::function<void(const std::string& folder)>& visit);

}  // namespace recycle
