// RMSNorm and the products of q, k and v, in one kernel: x [rows, hidden] -> q [rows, heads * head_dim], k and v.
// RoPE and the append are attention's (attention.cu): a rotation needs outputs of two panels, and every split of
// the cache can do it again for less than a kernel of its own costs. Bounded by reading the three matrices.
#include "kernels.h"

namespace recycle::cuda {

namespace {

struct QkvOp {
  static constexpr int kMatrices = 1;
  struct State {};

  Matrix matrices[3];
  const float* biases[3];
  float* outs[3];
  int64_t ends[3];  // units up to the end of each matrix
  int64_t k, units;
  Input input;

  int format() const { return common_format(matrices[0], matrices[1], matrices[2]); }
  RECYCLE_DEVICE int of(int64_t unit) const { return unit < ends[0] ? 0 : unit < ends[1] ? 1 : 2; }
  RECYCLE_DEVICE Matrix matrix(int, int64_t unit) const { return matrices[of(unit)]; }
  RECYCLE_DEVICE int64_t panel(int64_t unit) const {
    const int part = of(unit);
    return part == 0 ? unit : unit - ends[part - 1];
  }
  RECYCLE_DEVICE void put(State&, int row, int64_t unit, int lane, const float (&values)[1]) const {
    const int part = of(unit);
    const int64_t n = panel(unit) * kPanelRows + lane;
    const float* bias = biases[part];
    outs[part][row * matrices[part].n + n] = bias != nullptr ? values[0] + bias[n] : values[0];
  }
  RECYCLE_DEVICE void finish(const State&, int, int, bool) const {}
};

}  // namespace

void project_qkv(Launcher& launcher, const Stack& stack, const Layer& layer, const Input& x,
                 const AttentionArrays& out) {
  QkvOp op{{layer.q, layer.k, layer.v},
           {layer.q_bias, layer.k_bias, layer.v_bias},
           {out.q, out.k, out.v},
           {n_panels(layer.q.n), 0, 0},
           stack.hidden,
           0,
           x};
  op.ends[1] = op.ends[0] + n_panels(layer.k.n);
  op.units = op.ends[2] = op.ends[1] + n_panels(layer.v.n);
  launcher.products(op);
}

}  // namespace recycle::cuda
