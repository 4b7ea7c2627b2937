// Rows of a file to float32, and from float32 to the rows of another format.
#pragma once

#include <cstddef>
#include <cstdint>

#include "recycle/format.h"

namespace recycle {

// k columns of a row as float32, [k]. k is a multiple of the format's block.
void dequantize(Format format, const std::byte* row, int64_t k, float* values);

// Whether quantize() has the format. The others come from files alone.
constexpr bool has_quantizer(Format format) { return format <= Format::q5_1; }

// k values as a row of a format that has_quantizer(). k is a multiple of the format's block.
void quantize(Format format, const float* values, int64_t k, std::byte* row);

}  // namespace recycle
