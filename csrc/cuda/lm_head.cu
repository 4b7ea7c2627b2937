// RMSNorm, output matrix and argmax: x [rows, hidden] -> for each row and block the largest logit and its token.
//
// Bounded by reading the head. A thread keeps the best of one output in 16 of the panels that its block takes, so
// logits never reach memory, unless sampling asks for them; blocks are compared by who reads the bests (select.cu).
// The lowest token wins among equals, whichever block had which panel. A logit that isn't finite makes its row's
// best NaN.
#include "kernels.h"

namespace recycle::cuda {

namespace {

struct HeadOp {
  static constexpr int kMatrices = 1;
  struct State {
    float value = -INFINITY;
    float poison = 0;  // 0, or NaN once a logit was NaN or infinite
    int id = 0;
  };

  Matrix head;
  float* logits;
  HeadBests bests;
  int64_t k, units;
  Input input;

  int format() const { return common_format(head); }
  RECYCLE_DEVICE Matrix matrix(int, int64_t) const { return head; }
  RECYCLE_DEVICE int64_t panel(int64_t unit) const { return unit; }
  RECYCLE_DEVICE void put(State& state, int row, int64_t unit, int lane,
                          const float (&values)[1]) const {
    const int64_t n = unit * kPanelRows + lane;
    if (n >= head.n) return;
    if (logits != nullptr) logits[row * head.n + n] = values[0];
    state.poison += values[0] * 0.0f;
    if (values[0] > state.value) {
      state.value = values[0];
      state.id = static_cast<int>(n);
    }
  }
  // Of 16 neighbouring threads, which have the same row.
  RECYCLE_DEVICE void finish(State state, int row, int lane, bool in_use) const {
    for (int mask = kPanelRows / 2; mask > 0; mask /= 2) {
      const float value = shuffle_xor(state.value, mask);
      const int id = shuffle_xor(state.id, mask);
      state.poison += shuffle_xor(state.poison, mask);
      if (value > state.value || (value == state.value && id < state.id)) {
        state.value = value;
        state.id = id;
      }
    }
    if (lane != 0 || !in_use) return;
    const int64_t at = int64_t{row} * bests.blocks + blockIdx.x;
    bests.value[at] = state.value + state.poison;
    bests.id[at] = state.id;
  }
};

}  // namespace

void scan_head(Launcher& launcher, const Matrix& head, const Input& x, float* logits,
               const HeadBests& bests) {
  launcher.products(HeadOp{head, logits, bests, head.k, n_panels(head.n), x});
}

}  // namespace recycle::cuda
