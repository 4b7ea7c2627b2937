// Matrix times a few vectors, from packed panels (format.h).
//
//   x [rows, k] float32, W [n, k] packed  ->  out [rows, 16 panels]
//
// Bounded by memory for one or two rows: each weight is read once, widened once to float32 in a
// register, and used for all rows of a tile. Above ~8 rows (prefill) bounded by FMAs.
// A tile is R rows x P panels of running sums in registers; R and P change which sums are computed
// together, never the order inside one.
#pragma once

namespace recycle::RECYCLE_ISA {
namespace {

template <int R, int P>
struct Tile {
  Lanes sum[R][P];

  Tile() {
    for (auto& row : sum)
      for (auto& lanes : row) lanes = splat(0);
  }
  // One column of weights against one activation of each row.
  void add_column(int p, Lanes weights, const float* x, int64_t ld_x) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r][p] = fma(weights, splat(x[r * ld_x]), sum[r][p]);
  }
};

template <Format format, int R, int P>
inline void accumulate_plain(const std::byte* const (&panel)[P], int64_t k, const float* x,
                             int64_t ld_x, Tile<R, P>& tile) {
  if constexpr (format == Format::f32) {
    for (int64_t i = 0; i < k; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
        tile.add_column(p, load(reinterpret_cast<const float*>(panel[p]) + i * 16), x + i, ld_x);
    }
  } else if constexpr (format == Format::f16) {
    for (int64_t i = 0; i < k; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) tile.add_column(p, load_f16(panel[p] + i * 32), x + i, ld_x);
    }
  } else {
    for (int64_t i = 0; i < k; i += 2) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const Raw raw = load_raw(panel[p] + i * 32);
        tile.add_column(p, bf16_even(raw), x + i, ld_x);
        tile.add_column(p, bf16_odd(raw), x + i + 1, ld_x);
      }
    }
  }
}

template <int R, int P>
inline void block_q8(const std::byte* const (&quants)[P], int64_t first, const float* x,
                     int64_t ld_x, Tile<R, P>& block) {
  for (int64_t i = first; i < first + kBlock; i += 4) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Raw raw = load_raw(quants[p] + i * 16);
      block.add_column(p, q8<0>(raw), x + i, ld_x);
      block.add_column(p, q8<1>(raw), x + i + 1, ld_x);
      block.add_column(p, q8<2>(raw), x + i + 2, ld_x);
      block.add_column(p, q8<3>(raw), x + i + 3, ld_x);
    }
  }
}

template <int R, int P>
inline void block_q4(const std::byte* const (&quants)[P], int64_t first, const float* x,
                     int64_t ld_x, Tile<R, P>& block) {
  for (int64_t i = first; i < first + kBlock; i += 8) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Raw raw = load_raw(quants[p] + i * 8);
      block.add_column(p, q4<0>(raw), x + i, ld_x);
      block.add_column(p, q4<1>(raw), x + i + 1, ld_x);
      block.add_column(p, q4<2>(raw), x + i + 2, ld_x);
      block.add_column(p, q4<3>(raw), x + i + 3, ld_x);
      block.add_column(p, q4<4>(raw), x + i + 4, ld_x);
      block.add_column(p, q4<5>(raw), x + i + 5, ld_x);
      block.add_column(p, q4<6>(raw), x + i + 6, ld_x);
      block.add_column(p, q4<7>(raw), x + i + 7, ld_x);
    }
  }
}

// Each block of 32 is summed with its integer weights, then scaled once. For q4 the offset of the
// nibbles meets the sum of the block's activations, which is the same for all outputs:
// sum(x (d q + m)) = d sum(x q) + m sum(x).
template <Format format, int R, int P>
inline void accumulate_quantised(const std::byte* const (&panel)[P], int64_t k, const float* x,
                                 int64_t ld_x, const float* block_sums, Tile<R, P>& tile) {
  const std::byte* quants[P];
  for (int p = 0; p < P; ++p) quants[p] = panel[p] + scale_bytes(format, k);
  const int64_t n_blocks = k / kBlock;
  for (int64_t b = 0; b < n_blocks; ++b) {
    Tile<R, P> block;
    if constexpr (format == Format::q8_0)
      block_q8(quants, b * kBlock, x, ld_x, block);
    else
      block_q4(quants, b * kBlock, x, ld_x, block);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      if constexpr (format == Format::q8_0) {
        const Lanes scale = load_f16(panel[p] + b * 32);
        for (int r = 0; r < R; ++r) tile.sum[r][p] = fma(scale, block.sum[r][p], tile.sum[r][p]);
      } else if constexpr (format == Format::q4_0) {
        const Lanes scale = load_f16(panel[p] + b * 32);
        for (int r = 0; r < R; ++r) {
          const Lanes offset = splat(-8 * block_sums[r * n_blocks + b]);
          tile.sum[r][p] = fma(scale, add(block.sum[r][p], offset), tile.sum[r][p]);
        }
      } else {
        const Lanes scale = load_f16(panel[p] + b * 64);
        const Lanes minimum = load_f16(panel[p] + b * 64 + 32);
        for (int r = 0; r < R; ++r) {
          const Lanes scaled = fma(scale, block.sum[r][p], tile.sum[r][p]);
          tile.sum[r][p] = fma(minimum, splat(block_sums[r * n_blocks + b]), scaled);
        }
      }
    }
  }
}

template <Format format, int R, int P>
void product_tile(const std::byte* first_panel, int64_t k, const float* x, int64_t ld_x,
                  const float* block_sums, float* out) {
  const std::byte* panel[P];
  for (int p = 0; p < P; ++p) panel[p] = first_panel + p * panel_bytes(format, k);
  Tile<R, P> tile;
  if constexpr (is_quantised(format))
    accumulate_quantised<format>(panel, k, x, ld_x, block_sums, tile);
  else
    accumulate_plain<format>(panel, k, x, ld_x, tile);
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) store(out + r * kTileRows + p * kPanelRows, tile.sum[r][p]);
}

template <Format format, int R>
void product_rows(const std::byte* first_panel, int64_t panels, int64_t k, const float* x,
                  int64_t ld_x, const float* block_sums, float* out) {
  constexpr int P = panels_for(R);
  const int64_t stride = panel_bytes(format, k);
  int64_t p = 0;
  for (; p + P <= panels; p += P)
    product_tile<format, R, P>(first_panel + p * stride, k, x, ld_x, block_sums,
                               out + p * kPanelRows);
  if constexpr (P > 1)
    for (; p < panels; ++p)
      product_tile<format, R, 1>(first_panel + p * stride, k, x, ld_x, block_sums,
                                 out + p * kPanelRows);
}

template <Format format>
void product_of(const Matrix& matrix, int64_t panel, int64_t panels, const float* x, int64_t ld_x,
                int64_t rows, const float* block_sums, float* out) {
  using Function =
      void (*)(const std::byte*, int64_t, int64_t, const float*, int64_t, const float*, float*);
  constexpr Function by_rows[6] = {product_rows<format, 1>,
                                   product_rows<format, 2>,
                                   product_rows<format, 3>,
                                   product_rows<format, 4>,
                                   product_rows<format, (max_rows() < 5 ? 4 : 5)>,
                                   product_rows<format, (max_rows() < 6 ? 4 : 6)>};
  // Groups of nearly equal height: 8 rows are 4 + 4, not 6 + 2.
  int64_t groups = (rows + max_rows() - 1) / max_rows();
  for (int64_t r = 0; r < rows; --groups) {
    const int64_t height = (rows - r + groups - 1) / groups;
    by_rows[height - 1](matrix.panel(panel), panels, matrix.k, x + r * ld_x, ld_x,
                        block_sums + r * (matrix.k / kBlock), out + r * kTileRows);
    r += height;
  }
}

void product(const Matrix& matrix, int64_t panel, int64_t panels, const float* x, int64_t ld_x,
             int64_t rows, const float* block_sums, float* out) {
  switch (matrix.format) {
    case Format::f32:
      return product_of<Format::f32>(matrix, panel, panels, x, ld_x, rows, block_sums, out);
    case Format::f16:
      return product_of<Format::f16>(matrix, panel, panels, x, ld_x, rows, block_sums, out);
    case Format::bf16:
      return product_of<Format::bf16>(matrix, panel, panels, x, ld_x, rows, block_sums, out);
    case Format::q8_0:
      return product_of<Format::q8_0>(matrix, panel, panels, x, ld_x, rows, block_sums, out);
    case Format::q4_0:
      return product_of<Format::q4_0>(matrix, panel, panels, x, ld_x, rows, block_sums, out);
    case Format::q4_1:
      return product_of<Format::q4_1>(matrix, panel, panels, x, ld_x, rows, block_sums, out);
  }
}

void block_sums(const float* x, int64_t ld_x, int64_t rows, int64_t k, float* sums) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t b = 0; b < k / kBlock; ++b) {
      const float* block = x + r * ld_x + b * kBlock;
      sums[r * (k / kBlock) + b] = sum(add(load(block), load(block + 16)));
    }
}

}  // namespace
}  // namespace recycle::RECYCLE_ISA
