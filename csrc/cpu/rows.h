// Which rows go through the layers together: some consecutive rows of each of some sequences.
#pragma once

#include <algorithm>
#include <cstdint>

#include "recycle/parallel.h"

namespace recycle {

struct Segment {
  int64_t sequence;
  int64_t position;  // of the segment's first row
  int64_t row;       // index of the first row among all rows
  int64_t n_rows;
};

struct Rows {
  int64_t n = 0;
  int64_t n_segments = 0;
  Segment* segments = nullptr;

  void clear() { n = n_segments = 0; }
  void add(int64_t sequence, int64_t position, int64_t count) {
    segments[n_segments++] = {sequence, position, n, count};
    n += count;
  }
};

// body(segment, row, position) for each row in `range`.
template <class Body>
void for_each_row(const Rows& rows, Range range, Body body) {
  for (int64_t s = 0; s < rows.n_segments; ++s) {
    const Segment& segment = rows.segments[s];
    const int64_t end = std::min(range.end, segment.row + segment.n_rows);
    for (int64_t row = std::max(range.begin, segment.row); row < end; ++row)
      body(segment, row, segment.position + row - segment.row);
  }
}

}  // namespace recycle
