// Which rows go through the layers together: some consecutive rows of each of some sequences.
#pragma once

#include <cstdint>

namespace recycle {

struct Segment {
  int64_t sequence;
  int64_t position;  // of its first row
  int64_t row;       // its first row
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

}  // namespace recycle
