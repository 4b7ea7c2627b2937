// What bounds loading is the page cache: a thread reads rows into a buffer that stays in its L2 cache, converts them
// there where the format changes, and packs them into their panels.
//
// Files are read, not mapped. A mapped file that another process shortens, or whose disk fails, ends the process by
// SIGBUS; a read says so, and both can be reported. The copy into the buffer costs a fifth of the time of packing, and no
// page of the file counts as this process's memory.
#include "load.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <vector>

#include "convert.h"
#include "recycle/parallel.h"

namespace recycle {

namespace {

constexpr int64_t kChunkBytes = 128 << 10;  // that a thread reads at once; a part of its L2 cache
constexpr int64_t kPieceColumns = 256;      // that are converted at once, in the L1 cache

// The source's row that is row `row` of the matrix.
int64_t source_row(const RowSource& source, int64_t row) {
  if (source.ids != nullptr) row = source.ids[row];
  const int64_t h = source.interleaved_head_dim;
  return h == 0 ? row : row / h * h + row % (h / 2) * 2 + row % h / (h / 2);
}

// Bytes [begin, begin + size) of the source's rows.
LoadStatus read_bytes(const RowSource& source, int64_t begin, int64_t size, std::byte* to) {
  if (source.file < 0) {
    std::memcpy(to, source.rows + source.offset + begin, size);
    return {};
  }
  while (size > 0) {
    const int64_t at = source.offset + begin;
    const ssize_t count = pread(source.file, to, size, at);
    if (count == 0) return {0, at};
    if (count < 0 && errno != EINTR) return {errno};
    if (count < 0) continue;
    begin += count, size -= count, to += count;
  }
  return {};
}

// Rows [begin, end) of the matrix, one after the other. Rows that are neighbours in the source are read together.
LoadStatus read_rows(const RowSource& source, int64_t begin, int64_t end, std::byte* to) {
  const int64_t bytes = row_bytes(source.format, source.k);
  while (begin < end) {
    const int64_t first = source_row(source, begin);
    int64_t count = 1;
    while (begin + count < end && source_row(source, begin + count) == first + count) ++count;
    const LoadStatus status = read_bytes(source, first * bytes, count * bytes, to);
    if (status.error != 0 || status.file_end >= 0) return status;
    begin += count, to += count * bytes;
  }
  return {};
}

// One row in another format. Pieces of it are whole blocks of both formats.
void convert_row(Format from, const std::byte* row, int64_t k, Format target, std::byte* to) {
  float values[kPieceColumns];
  for (int64_t begin = 0; begin < k; begin += kPieceColumns) {
    const int64_t columns = std::min(kPieceColumns, k - begin);
    dequantize(from, row + row_bytes(from, begin), columns, values);
    quantize(target, values, columns, to + row_bytes(target, begin));
  }
}

}  // namespace

LoadStatus load_rows(const RowSource& source, Format target, int64_t begin, int64_t end, std::byte* packed,
                     int n_threads) {
  const int64_t k = source.k, bytes = row_bytes(source.format, k);
  const bool converts = source.format != target;
  const int64_t chunk = std::max(kChunkBytes / bytes / kPanelRows, int64_t{1}) * kPanelRows;
  const int64_t converted_bytes = converts ? kPanelRows * row_bytes(target, k) : 0;
  const int64_t buffer_bytes = round_up(chunk * bytes + converted_bytes, kAlign);
  // Before the threads start: an exception of theirs would end the process.
  std::vector<std::byte> buffers(buffer_bytes * n_threads);
  // Chunks are taken in the file's order, so that the system reads ahead.
  std::atomic<int64_t> next{begin};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  LoadStatus result;
  parallel(n_threads, [&](const Team& team) {
    std::byte* rows = buffers.data() + team.thread * buffer_bytes;
    std::byte* converted = rows + chunk * bytes;
    for (int64_t first; !failed && (first = next.fetch_add(chunk)) < end;) {
      const int64_t count = std::min(chunk, end - first);
      const LoadStatus status = read_rows(source, first, first + count, rows);
      if (status.error != 0 || status.file_end >= 0) {
        const std::lock_guard<std::mutex> lock(mutex);
        result = status;
        failed = true;
        return;
      }
      if (!converts) {
        pack_rows(target, k, first, count, rows, packed);
        continue;
      }
      for (int64_t row = 0; row < count; row += kPanelRows) {
        const int64_t lanes = std::min(kPanelRows, count - row);
        for (int64_t lane = 0; lane < lanes; ++lane)
          convert_row(source.format, rows + (row + lane) * bytes, k, target, converted + lane * row_bytes(target, k));
        pack_rows(target, k, first + row, lanes, converted, packed);
      }
    }
  });
  return result;
}

}  // namespace recycle
