// The result of a kernel entry point. Kernels never throw and never print; the bindings turn a status into a
// Python exception.
#pragma once

#include <cstdint>

namespace recycle {

enum class StatusCode : int32_t {
  ok = 0,
  nonfinite = 1,    // a logit was NaN or infinite, at `sequence` and `position`
  interrupted = 2,  // prefill: the caller asked for the end
};

struct Status {
  StatusCode code = StatusCode::ok;
  int64_t sequence = -1;
  int64_t position = -1;
};

}  // namespace recycle
