// What a kernel entry point reports. Kernels never throw and never print: the binding turns a
// status into a Python exception.
#pragma once

#include <cstdint>

namespace recycle {

enum class StatusCode : int32_t {
  ok = 0,
  non_finite = 1,  // a logit was NaN or infinite; `sequence` and `position` say where
};

struct Status {
  StatusCode code = StatusCode::ok;
  int64_t sequence = -1;
  int64_t position = -1;
};

}  // namespace recycle
