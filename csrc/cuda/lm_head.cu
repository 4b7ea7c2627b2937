// The LM head with the RMSNorm before it and a partial argmax after it, in one kernel.
//
//   x [rows, hidden] -> the largest logit of each row and block, and its token; logits [rows, n] for sampling only
//
// Bounded by reading the matrix. A thread keeps the maximum of one output in 16 over the tiles of its block, so that
// a greedy step writes no logits; argmax() in sampling.h reduces the blocks. Among equal logits the lowest token
// wins, whichever block has it. A nonfinite logit makes the partial maximum NaN.
#include "gemv.cuh"

namespace recycle::cuda {

namespace {

struct LmHeadParams : GemvParams {
  static constexpr int kMatrices = 1;
  using State = Argmax;

  Matrix weight;
  float* logits;
  PartialArgmax partial;

  int format() const { return common_format(weight); }
  RECYCLE_DEVICE Matrix matrix(int, int64_t) const { return weight; }
  RECYCLE_DEVICE void epilogue(State& state, int row, int64_t tile, int output, const float (&values)[1]) const {
    const int64_t n = tile * kPanelRows + output;
    if (n >= weight.n) return;
    if (logits != nullptr) logits[row * weight.n + n] = values[0];
    state.nonfinite += values[0] * 0.0f;
    state.combine(values[0], static_cast<int>(n));
  }
  RECYCLE_DEVICE void finish(State state, int row, int output, bool is_used) const {
    state.reduce(kPanelRows);  // the 16 threads of a row are neighbours
    if (output != 0 || !is_used) return;
    const int64_t at = int64_t{row} * partial.blocks + blockIdx.x;
    partial.value[at] = state.value + state.nonfinite;
    partial.token[at] = state.token;
  }
};

}  // namespace

void lm_head(Launcher& launcher, const Matrix& weight, const GemvInput& x, float* logits,
             const PartialArgmax& partial) {
  launch_gemv(launcher, LmHeadParams{{weight.k, n_panels(weight.n), x}, weight, logits, partial});
}

}  // namespace recycle::cuda
