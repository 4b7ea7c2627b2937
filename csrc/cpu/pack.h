// Looks up rows in packed weights.
#pragma once

#include <cstdint>

#include "recycle/format.h"

namespace recycle {

// Row `row` of the matrix as float32, [k].
void unpack_row(const Matrix& matrix, int64_t row, float* out);

}  // namespace recycle
