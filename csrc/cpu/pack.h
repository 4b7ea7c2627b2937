// unpack_row(), for embeddings; pack_rows() is declared in recycle/format.h. pack.cpp defines both.
#pragma once

#include <cstdint>

#include "recycle/format.h"

namespace recycle {

// Row `row` of the matrix as float32, [k].
void unpack_row(const Matrix& matrix, int64_t row, float* out);

}  // namespace recycle
