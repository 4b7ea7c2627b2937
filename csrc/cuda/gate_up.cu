// The gate and up projections of the MLP, with the RMSNorm before and the SwiGLU after them, in one kernel.
//
//   x [rows, hidden] -> silu(gate x) * (up x) [rows, intermediate]
//
// Bounded by reading the two matrices, the largest part of a layer. A block takes the same panel of both, so that
// SwiGLU needs no memory.
#include "gemv.cuh"

namespace recycle::cuda {

namespace {

struct GateUpParams : GemvParams {
  static constexpr int kMatrices = 2;

  Matrix gate, up;
  float* out;

  int format() const { return common_format(gate, up); }
  RECYCLE_DEVICE Matrix matrix(int m, int64_t) const { return m == 0 ? gate : up; }
  RECYCLE_DEVICE void epilogue(State&, int row, int64_t tile, int output, const float (&values)[2]) const {
    out[row * gate.n + tile * kPanelRows + output] = values[0] / (1 + expf(-values[0])) * values[1];
  }
};

}  // namespace

void gate_up(Launcher& launcher, const Stack& stack, const Layer& layer, const GemvInput& x, float* out) {
  launch_gemv(launcher, GateUpParams{{stack.hidden, n_panels(layer.gate.n), x}, layer.gate, layer.up, out});
}

}  // namespace recycle::cuda
