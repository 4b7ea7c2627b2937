// Signals while an op runs: Ctrl-C must end a long prefill.
#pragma once

namespace recycle::bindings {

// Runs Python's handlers of the signals that have come, which Python does on its main thread alone. True if one raised:
// the op then ends, by throw_interrupt().
bool interrupted();
[[noreturn]] void throw_interrupt();

}  // namespace recycle::bindings
