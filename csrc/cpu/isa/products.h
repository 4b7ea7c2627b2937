// Matrix times a few vectors, from packed panels (format.h).
//
//   x [rows, k], W [n, k] packed  ->  out [rows, 16 panels] float32
//
// Bounded by memory for one or two rows: each weight is read once and unpacked once for all rows of a
// tile. Above ~8 rows (prefill) bounded by multiplications.
// A tile is R rows x P panels of running sums in registers; R and P change which sums are computed
// together, never the order inside one.
//
// Float weights are widened to float32 and multiplied with the float32 activations. Quantised weights stay
// integers: the activations, rounded to 16 bits with a scale for each block of 32 (quantise() below), are
// multiplied with them in pairs, and a block's sum is exact in 32 bits. Rounding to 16 bits moves a result
// by ~2e-5 of its size, a sixtieth of what bfloat16 does.
// Rejected: widening quants to float32 (three times the instructions: it, not memory, was the bound);
// activations in 8 bits, as is common (half the instructions again, which memory then hides, and 250 times
// the error).
#pragma once

namespace recycle::RECYCLE_ISA {
namespace {

// How far ahead of the loads weights are asked for. The hardware's prefetchers start anew with every panel;
// of 512, 1024, 2048 and 4096 bytes, all within noise of each other, all were 10 to 20% faster than none
// for 8 and 4 bits on a Zen 4.
constexpr int64_t kPrefetchBytes = 1024;

inline void prefetch(const std::byte* p) {
  __builtin_prefetch(p + kPrefetchBytes, 0, 3);
}

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
                             Tile<R, P>& tile) {
  if constexpr (format == Format::f32) {
    for (int64_t i = 0; i < k; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
        tile.add_column(p, load(reinterpret_cast<const float*>(panel[p]) + i * 16), x + i, k);
    }
  } else if constexpr (format == Format::f16) {
    for (int64_t i = 0; i < k; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) tile.add_column(p, load_f16(panel[p] + i * 32), x + i, k);
    }
  } else {
    for (int64_t i = 0; i < k; i += 2) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const Raw raw = load_raw(panel[p] + i * 32);
        prefetch(panel[p] + i * 32);
        tile.add_column(p, bf16_even(raw), x + i, k);
        tile.add_column(p, bf16_odd(raw), x + i + 1, k);
      }
    }
  }
}

// Integer sums of one block.
template <int R, int P>
struct BlockTile {
  Ints sum[R][P];

  BlockTile() {
    for (auto& row : sum)
      for (auto& ints : row) ints = zero();
  }
  // Two columns of weights against a pair of activations of each row; a row has `ld` pairs.
  void add_columns(int p, Pairs weights, const int32_t* pairs, int64_t ld) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r][p] = dot(sum[r][p], weights, pairs[r * ld]);
  }
};

template <int R, int P>
inline void block_q8(const std::byte* const (&quants)[P], int64_t first, const int32_t* pairs,
                     int64_t ld, BlockTile<R, P>& block) {
#pragma GCC unroll 2
  for (int64_t i = first; i < first + kBlock; i += 4) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Raw raw = load_raw(quants[p] + i * 16);
      prefetch(quants[p] + i * 16);
      block.add_columns(p, even_bytes(raw), pairs + i / 2, ld);
      block.add_columns(p, odd_bytes(raw), pairs + i / 2 + 1, ld);
    }
  }
}

template <int R, int P>
inline void block_q4(const std::byte* const (&quants)[P], int64_t first, const int32_t* pairs,
                     int64_t ld, BlockTile<R, P>& block) {
  for (int64_t i = first; i < first + kBlock; i += 8) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Raw raw = load_raw(quants[p] + i * 8);
      prefetch(quants[p] + i * 8);
      block.add_columns(p, nibbles<0>(raw), pairs + i / 2, ld);
      block.add_columns(p, nibbles<2>(raw), pairs + i / 2 + 1, ld);
      block.add_columns(p, nibbles<1>(raw), pairs + i / 2 + 2, ld);
      block.add_columns(p, nibbles<3>(raw), pairs + i / 2 + 3, ld);
    }
  }
}

// The offset of 4-bit weights meets the sum of the block's activations, which is the same for all outputs:
// sum(x (d q + m)) = d sum(x q) + m sum(x).
template <Format format, int R, int P>
inline void accumulate_quantised(const std::byte* const (&panel)[P], int64_t k,
                                 const Activations& x, Tile<R, P>& tile) {
  const std::byte* quants[P];
  for (int p = 0; p < P; ++p) quants[p] = panel[p] + scale_bytes(format, k);
  const int64_t n_blocks = k / kBlock;
  for (int64_t b = 0; b < n_blocks; ++b) {
    BlockTile<R, P> block;
    if constexpr (format == Format::q8_0)
      block_q8(quants, b * kBlock, x.pairs, k / 2, block);
    else
      block_q4(quants, b * kBlock, x.pairs, k / 2, block);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Lanes scale = load_f16(panel[p] + b * (format == Format::q4_1 ? 64 : 32));
      for (int r = 0; r < R; ++r) {
        const Lanes both = mul(scale, splat(x.scales[r * n_blocks + b]));
        tile.sum[r][p] = fma(both, to_float(block.sum[r][p]), tile.sum[r][p]);
      }
      if constexpr (format != Format::q8_0) {
        const Lanes offset =
            format == Format::q4_1 ? load_f16(panel[p] + b * 64 + 32) : mul(scale, splat(-8));
        for (int r = 0; r < R; ++r)
          tile.sum[r][p] = fma(offset, splat(x.sums[r * n_blocks + b]), tile.sum[r][p]);
      }
    }
  }
}

template <Format format, int R, int P>
void product_tile(const std::byte* first_panel, int64_t k, const Activations& x, float* out) {
  const std::byte* panel[P];
  for (int p = 0; p < P; ++p) panel[p] = first_panel + p * panel_bytes(format, k);
  Tile<R, P> tile;
  if constexpr (is_quantised(format))
    accumulate_quantised<format>(panel, k, x, tile);
  else
    accumulate_plain<format>(panel, k, x.x, tile);
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) store(out + r * kTileRows + p * kPanelRows, tile.sum[r][p]);
}

template <Format format, int R>
void product_rows(const std::byte* first_panel, int64_t panels, int64_t k, const Activations& x,
                  float* out) {
  constexpr int P = panels_for(R);
  const int64_t stride = panel_bytes(format, k);
  int64_t p = 0;
  for (; p + P <= panels; p += P)
    product_tile<format, R, P>(first_panel + p * stride, k, x, out + p * kPanelRows);
  if constexpr (P > 1)
    for (; p < panels; ++p)
      product_tile<format, R, 1>(first_panel + p * stride, k, x, out + p * kPanelRows);
}

template <Format format>
void product_of(const Matrix& matrix, int64_t panel, int64_t panels, const Activations& x,
                int64_t rows, float* out) {
  using Function = void (*)(const std::byte*, int64_t, int64_t, const Activations&, float*);
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
    by_rows[height - 1](matrix.panel(panel), panels, matrix.k, x.from_row(r, matrix.k),
                        out + r * kTileRows);
    r += height;
  }
}

void product(const Matrix& matrix, int64_t panel, int64_t panels, const Activations& x,
             int64_t rows, float* out) {
  switch (matrix.format) {
    case Format::f32:
      return product_of<Format::f32>(matrix, panel, panels, x, rows, out);
    case Format::f16:
      return product_of<Format::f16>(matrix, panel, panels, x, rows, out);
    case Format::bf16:
      return product_of<Format::bf16>(matrix, panel, panels, x, rows, out);
    case Format::q8_0:
      return product_of<Format::q8_0>(matrix, panel, panels, x, rows, out);
    case Format::q4_0:
      return product_of<Format::q4_0>(matrix, panel, panels, x, rows, out);
    case Format::q4_1:
      return product_of<Format::q4_1>(matrix, panel, panels, x, rows, out);
  }
}

void quantise(const float* x, int64_t n, int32_t* pairs, float* scales, float* sums) {
  for (int64_t b = 0; b < n / kBlock; ++b) {
    const Lanes low = load(x + b * kBlock);
    const Lanes high = load(x + b * kBlock + 16);
    const Lanes zeros = splat(0);
    const Lanes sizes = max(max(low, sub(zeros, low)), max(high, sub(zeros, high)));
    const float largest = max_of(sizes);
    const float total = sum(add(low, high));
    // Below, a block is nothing, and dividing by it would overflow.
    const bool counts = largest > 1e-30f;
    const Lanes up = splat(counts ? 32767 / largest : 0.0f);
    const Lanes low_quants = round(mul(low, up));
    const Lanes high_quants = round(mul(high, up));
    store_pairs(pairs + b * 16, low_quants);
    store_pairs(pairs + b * 16 + 8, high_quants);
    // What is not finite must show in the result: integers can't hold it, the scale can.
    scales[b] = (counts ? largest / 32767 : 0.0f) + total * 0.0f;
    // Of the rounded values: so their errors meet d q + m, the weight, and not d q alone.
    sums[b] = scales[b] * sum(add(low_quants, high_quants));
  }
}

}  // namespace
}  // namespace recycle::RECYCLE_ISA
