// Loading: rows of a file, or of memory, to packed panels, by all threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "recycle/format.h"

namespace recycle {

// Where the rows of a matrix come from.
struct RowSource {
  Format format = Format::f32;
  int64_t k = 0;
  int file = -1;                    // a descriptor; -1: the rows are in memory
  const std::byte* rows = nullptr;  // in memory, one after the other
  int64_t offset = 0;               // bytes from the start of the file, or of `rows`, to row 0
  // llama.cpp stores the rows of a head of q and k in the order 0, h/2, 1, h/2 + 1, ... (h is this number, the head
  // size). 0: no such order.
  int64_t interleaved_head_dim = 0;
  const int64_t* ids = nullptr;  // row i of the matrix is row ids[i] of the source; null: row i
};

// How loading ended. All zero and -1: well.
struct LoadStatus {
  int error = 0;          // errno of a failed read
  int64_t file_end = -1;  // the byte at which the file ended before its last row
};

// Packs rows [begin, end) of a matrix in format `target`, which is the source's or has_quantizer(). `packed` is the
// whole matrix; `begin` is a multiple of 16, and so is `end` unless it is the last.
LoadStatus load_rows(const RowSource& source, Format target, int64_t begin, int64_t end, std::byte* packed,
                     int n_threads);

}  // namespace recycle
