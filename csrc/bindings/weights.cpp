#include "weights.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cerrno>
#include <optional>

#include "../cpu/convert.h"
#include "../cpu/huge_pages.h"
#include "../cpu/load.h"
#include "recycle/format.h"
#include "threads.h"

namespace py = pybind11;

namespace recycle::bindings {

namespace {

Format format_of(int format) {
  if (format < 0 || format >= kFormats)
    throw std::invalid_argument("format is " + std::to_string(format) + "; it must be 0 to " +
                                std::to_string(kFormats - 1));
  return static_cast<Format>(format);
}

void check_k(Format format, int64_t k) {
  const int64_t multiple = k_multiple(format);
  if (k < 1 || k % multiple != 0)
    throw std::invalid_argument("a row has " + std::to_string(k) + " weights; this format needs a multiple of " +
                                std::to_string(multiple));
}

// A packed matrix [n, k], and which rows of it a call fills.
struct Target {
  Target(int format, int64_t n, int64_t k, int64_t begin, int64_t end, const py::buffer& packed)
      : format(format_of(format)), begin(begin), end(end), buffer(packed, true) {
    check_k(this->format, k);
    if (begin < 0 || begin > end || begin % kPanelRows != 0 || end > n || (end % kPanelRows != 0 && end != n))
      throw std::invalid_argument("rows must begin at a multiple of 16 and end at one or at the last");
    if (const int64_t bytes = matrix_bytes(this->format, n, k); buffer.bytes != bytes)
      throw std::invalid_argument("packed has " + std::to_string(buffer.bytes) + " bytes; the matrix takes " +
                                  std::to_string(bytes));
  }
  // Packs the rows of the source; returns the byte at which its file ended too early.
  std::optional<int64_t> load(const RowSource& source, std::optional<int> threads) const {
    check_k(source.format, source.k);
    if (source.format != format && !has_quantizer(format))
      throw std::invalid_argument("weights are not converted to this format; they come from files");
    const int n = threads ? check_n_threads(*threads) : n_threads();
    auto* packed = static_cast<std::byte*>(buffer.info.ptr);
    const LoadStatus status = [&] {
      const py::gil_scoped_release release;
      return load_rows(source, format, begin, end, packed, n);
    }();
    if (status.error != 0) {
      errno = status.error;
      PyErr_SetFromErrno(PyExc_OSError);
      throw py::error_already_set();
    }
    return status.file_end < 0 ? std::nullopt : std::optional(status.file_end);
  }
  Format format;
  int64_t begin, end;
  Buffer buffer;
};

void pack_rows(int source_format, const py::buffer& rows, int format, int64_t n, int64_t k, int64_t begin,
               const py::buffer& packed, std::optional<int> threads) {
  RowSource source{.format = format_of(source_format), .k = k};
  check_k(source.format, k);
  const Buffer memory(rows, false);
  const int64_t bytes = row_bytes(source.format, k);
  if (memory.bytes % bytes != 0)
    throw std::invalid_argument("rows has " + std::to_string(memory.bytes) + " bytes; a row of this format has " +
                                std::to_string(bytes));
  const Target target(format, n, k, begin, begin + memory.bytes / bytes, packed);
  source.rows = static_cast<const std::byte*>(memory.info.ptr);
  source.offset = -begin * bytes;
  target.load(source, threads);
}

std::optional<int64_t> load_rows_of_file(int file, int64_t offset, int64_t file_rows, int source_format,
                                         int64_t interleaved_head_dim, std::optional<py::buffer> ids, int format,
                                         int64_t n, int64_t k, int64_t begin, int64_t end, const py::buffer& packed,
                                         std::optional<int> threads) {
  RowSource source{.format = format_of(source_format), .k = k, .file = file, .offset = offset};
  if (interleaved_head_dim < 0 || interleaved_head_dim % 2 != 0 ||
      (interleaved_head_dim > 0 && file_rows % interleaved_head_dim != 0))
    throw std::invalid_argument("the rows of the file must be whole heads, and a head's rows an even number");
  source.interleaved_head_dim = interleaved_head_dim;
  std::optional<Buffer> list;
  if (ids) {
    list.emplace(*ids, false);
    source.ids = static_cast<const int64_t*>(list->info.ptr);
    if (list->bytes != n * 8 ||
        std::any_of(source.ids, source.ids + n, [&](int64_t id) { return id < 0 || id >= file_rows; }))
      throw std::invalid_argument("ids must be n int64 numbers of rows in the file");
  } else if (n != file_rows) {
    throw std::invalid_argument("without ids, the matrix has the rows of the file");
  }
  return Target(format, n, k, begin, end, packed).load(source, threads);
}

void dequantize_rows(int format, int64_t k, const py::buffer& rows, const py::buffer& values) {
  const Format kind = format_of(format);
  check_k(kind, k);
  const Buffer from(rows, false), to(values, true);
  const int64_t bytes = row_bytes(kind, k), count = from.bytes / bytes;
  if (from.bytes != count * bytes || to.bytes != count * k * 4)
    throw std::invalid_argument("rows must be whole, and values must have 4 bytes for each of their weights");
  const auto* data = static_cast<const std::byte*>(from.info.ptr);
  auto* floats = static_cast<float*>(to.info.ptr);
  const py::gil_scoped_release release;
  parallel(n_threads(), [&](const Team& team) {
    const Range range = team.share(count);
    for (int64_t row = range.begin; row < range.end; ++row) dequantize(kind, data + row * bytes, k, floats + row * k);
  });
}

}  // namespace

void bind_weights(py::module_& m) {
  m.def(
      "use_huge_pages",
      [](const py::buffer& data) {
        const Buffer memory(data, true);
        recycle::use_huge_pages(memory.info.ptr, memory.bytes);
      },
      py::arg("data"), "Requests huge pages for memory that was not written to yet.");
  m.def("pack_rows", &pack_rows, py::arg("source_format"), py::arg("rows"), py::arg("format"), py::arg("n"),
        py::arg("k"), py::arg("begin"), py::arg("packed"), py::arg("threads") = py::none(),
        "Packs rows [begin, ...) of an [n, k] matrix into `packed`, a buffer for the whole matrix, and converts them "
        "where the formats differ.");
  m.def("load_rows", &load_rows_of_file, py::arg("file"), py::arg("offset"), py::arg("file_rows"),
        py::arg("source_format"), py::arg("interleaved_head_dim"), py::arg("ids"), py::arg("format"), py::arg("n"),
        py::arg("k"), py::arg("begin"), py::arg("end"), py::arg("packed"), py::arg("threads") = py::none(),
        "The same for rows [begin, end) of a matrix in a file: a descriptor, and the byte of its first row. ids: row i "
        "is the file's row ids[i]. Returns the byte at which the file ends too early, or None. Raises OSError.");
  m.def("dequantize_rows", &dequantize_rows, py::arg("format"), py::arg("k"), py::arg("rows"), py::arg("values"),
        "Rows of k weights in a format of files, to float32 values [rows, k].");
  m.def(
      "matrix_bytes",
      [](int format, int64_t n, int64_t k) {
        const Format kind = format_of(format);
        check_k(kind, k);
        return matrix_bytes(kind, n, k);
      },
      py::arg("format"), py::arg("n"), py::arg("k"), "Bytes of a packed matrix.");
  m.def(
      "quantization",
      [](int format) {
        const Quantization q = quantization(format_of(format));
        return py::make_tuple(q.block, q.group, q.low_bits, q.high_bits, q.zero_point_bits, q.header_bytes,
                              q.file_bytes);
      },
      py::arg("format"), "The numbers of format.h's Quantization; zeros for a float format.");
}

}  // namespace recycle::bindings
