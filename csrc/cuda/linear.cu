// One linear layer: the output projection of attention and the down projection of the MLP, both added to the residual
// stream, and the module's input projection.
//
//   x [rows, k] -> out [rows, n]
//
// Bounded by reading the matrix. One block computes an output, so that adding to `out` needs no atomics.
#include "gemv.cuh"

namespace recycle::cuda {

namespace {

struct LinearParams : GemvParams {
  static constexpr int kMatrices = 1;

  Matrix weight;
  const float* bias;
  bool accumulate;
  float* out;

  int format() const { return common_format(weight); }
  RECYCLE_DEVICE Matrix matrix(int, int64_t) const { return weight; }
  RECYCLE_DEVICE void epilogue(State&, int row, int64_t tile, int output, const float (&values)[1]) const {
    const int64_t n = tile * kPanelRows + output;  // always below weight.n, a multiple of 16 (plan.cpp)
    float* to = out + row * weight.n + n;
    const float value = bias != nullptr ? values[0] + bias[n] : values[0];
    *to = accumulate ? *to + value : value;
  }
};

}  // namespace

void linear(Launcher& launcher, const Matrix& weight, const float* bias, const GemvInput& x, bool accumulate,
            float* out) {
  launch_gemv(launcher, LinearParams{{weight.k, n_panels(weight.n), x}, weight, bias, accumulate, out});
}

}  // namespace recycle::cuda
