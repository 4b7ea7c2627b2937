// One matrix: the attention's and the MLP's output, added to the residual stream, and the module's input.
//
//   x [rows, k] -> to [rows, n]
//
// Bounded by reading the matrix. An output belongs to one block, so it is added to without atomics.
#include "kernels.h"

namespace recycle::cuda {

namespace {

struct ProjectOp {
  static constexpr int kMatrices = 1;
  struct State {};

  Matrix weights;
  const float* bias;
  bool add;
  float* to;
  int64_t k, units;
  Input input;

  int format() const { return common_format(weights); }
  RECYCLE_DEVICE Matrix matrix(int, int64_t) const { return weights; }
  RECYCLE_DEVICE int64_t panel(int64_t unit) const { return unit; }
  RECYCLE_DEVICE void put(State&, int row, int64_t unit, int lane, const float (&values)[1]) const {
    const int64_t n = unit * kPanelRows + lane;
    float* out = to + row * weights.n + n;
    const float value = bias != nullptr ? values[0] + bias[n] : values[0];
    *out = add ? *out + value : value;
  }
  RECYCLE_DEVICE void finish(const State&, int, int, bool) const {}
};

}  // namespace

void project(Launcher& launcher, const Matrix& matrix, const float* bias, const Input& x, bool add,
             float* to) {
  launcher.products(ProjectOp{matrix, bias, add, to, matrix.k, n_panels(matrix.n), x});
}

}  // namespace recycle::cuda
