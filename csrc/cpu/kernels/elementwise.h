// The small steps between the matmuls: RMSNorm, SwiGLU, argmax, exponentials.
//
// All work on float32 vectors in the L1 cache, and take a few percent of a step together. Only read_stream(),
// the bandwidth probe, reads from memory.
#pragma once

#include "prefetch.h"

namespace recycle::RECYCLE_ISA {
namespace {

// exp to ~1 ulp: x = n ln2 + r with |r| <= ln2 / 2; e^r is a polynomial (coefficients of Cephes' expf, public
// domain); the result is e^r 2^n. Below -87.3 the result is 0, so exp(-inf) is 0; above 88 x is clamped.
inline Lanes exp(Lanes x) {
  constexpr float lowest = -87.33654f;
  Lanes y = max(x, splat(lowest));
  y = sub(splat(0), max(sub(splat(0), y), splat(-88.0f)));
  const Lanes n = round(mul(y, splat(1.44269504f)));
  Lanes r = fma(n, splat(-0.693359375f), y);
  r = fma(n, splat(2.12194440e-4f), r);
  Lanes p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), splat(1));
  return keep_above(mul(p, power_of_2(n)), x, lowest);
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  Lanes squares = splat(0);
  for (int64_t i = 0; i < n; i += 16) squares = fma(load(x + i), load(x + i), squares);
  const float mean = reduce_add(squares) / static_cast<float>(n);
  const Lanes scale = splat(1 / __builtin_sqrtf(mean + eps));
  for (int64_t i = 0; i < n; i += 16) store(out + i, mul(load(weight + i), mul(load(x + i), scale)));
}

void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const Lanes g = load(gate + i);
    const Lanes silu = div(g, add(splat(1), exp(sub(splat(0), g))));
    store(out + i, mul(silu, load(up + i)));
  }
}

void argmax(const float* values, int64_t n, int64_t first_id, ArgMax* best) {
  for (int64_t i = 0; i < n; i += kPanelRows) {
    const int64_t lanes = n - i < kPanelRows ? n - i : kPanelRows;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const float value = values[i + lane];
      const bool better = value > best->value[lane];
      best->value[lane] = better ? value : best->value[lane];
      best->id[lane] = better ? static_cast<int32_t>(first_id + i + lane) : best->id[lane];
      best->nonfinite[lane] += value * 0.0f;
    }
  }
}

// The n < 16 last values of a vector, completed with `fill`.
inline Lanes load_tail(const float* values, int64_t n, float fill) {
  alignas(64) float tail[16];
  for (int64_t i = 0; i < 16; ++i) tail[i] = i < n ? values[i] : fill;
  return load(tail);
}

float read_stream(const float* values, int64_t n) {
  Lanes total[4] = {splat(0), splat(0), splat(0), splat(0)};
  for (int64_t i = 0; i < n; i += 64)
    for (int part = 0; part < 4; ++part) {
      const float* at = values + i + part * 16;
      prefetch_l2(reinterpret_cast<const std::byte*>(at) + kPrefetchL2Distance);
      total[part] = add(total[part], load(at));
    }
  return reduce_add(add(add(total[0], total[1]), add(total[2], total[3])));
}

float max_value(const float* values, int64_t n) {
  Lanes maximum = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) maximum = max(maximum, load(values + i));
  if (i < n) maximum = max(maximum, load_tail(values + i, n - i, -__builtin_inff()));
  return reduce_max(maximum);
}

float exp_sum(const float* values, int64_t n, float maximum, float scale, float* out) {
  Lanes total = splat(0);
  for (int64_t i = 0; i < n; i += 16) {
    const bool whole = i + 16 <= n;
    const Lanes x = whole ? load(values + i) : load_tail(values + i, n - i, -__builtin_inff());
    const Lanes term = exp(mul(sub(x, splat(maximum)), splat(scale)));
    total = add(total, term);
    if (out == nullptr) continue;
    if (whole) {
      store(out + i, term);
    } else {
      alignas(64) float tail[16];
      store(tail, term);
      for (int64_t lane = 0; i + lane < n; ++lane) out[i + lane] = tail[lane];
    }
  }
  return reduce_add(total);
}

}  // namespace
}  // namespace recycle::RECYCLE_ISA
