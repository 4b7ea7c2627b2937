// RMSNorm, gate, up and SwiGLU: x [rows, hidden] -> silu(gate x) * (up x) [rows, intermediate]. A block takes the
// same panel of both matrices. Bounded by reading them; the largest part of a layer.
#include "kernels.h"

namespace recycle::cuda {

namespace {

struct GateUpOp {
  static constexpr int kMatrices = 2;
  struct State {};

  Matrix gate, up;
  float* to;
  int64_t k, units;
  Input input;

  int format() const { return common_format(gate, up); }
  RECYCLE_DEVICE Matrix matrix(int m, int64_t) const { return m == 0 ? gate : up; }
  RECYCLE_DEVICE int64_t panel(int64_t unit) const { return unit; }
  RECYCLE_DEVICE void put(State&, int row, int64_t unit, int lane, const float (&values)[2]) const {
    to[row * gate.n + unit * kPanelRows + lane] = values[0] / (1 + expf(-values[0])) * values[1];
  }
  RECYCLE_DEVICE void finish(const State&, int, int, bool) const {}
};

}  // namespace

void gate_up(Launcher& launcher, const Stack& stack, const Layer& layer, const Input& x,
             float* activation) {
  launcher.products(
      GateUpOp{layer.gate, layer.up, activation, stack.hidden, n_panels(layer.gate.n), x});
}

}  // namespace recycle::cuda
