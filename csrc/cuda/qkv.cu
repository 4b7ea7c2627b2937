// The q, k and v projections with the RMSNorm before them, in one kernel.
//
//   x [rows, hidden] -> q [rows, n_heads * head_dim], k and v [rows, n_kv_heads * head_dim], before RoPE
//
// Bounded by reading the three matrices.
// Rejected: RoPE and the append to the cache in this epilogue. A rotation needs outputs of two panels; every block of
// attention.cu repeats it for less than the launch of one more kernel.
#include "gemv.cuh"

namespace recycle::cuda {

namespace {

struct QkvParams : GemvParams {
  static constexpr int kMatrices = 1;

  Matrix matrices[3];
  const float* biases[3];
  float* outs[3];
  int64_t ends[2];  // tiles up to the end of q, and of k

  int format() const { return common_format(matrices[0], matrices[1], matrices[2]); }
  RECYCLE_DEVICE int index(int64_t tile) const { return tile < ends[0] ? 0 : tile < ends[1] ? 1 : 2; }
  RECYCLE_DEVICE Matrix matrix(int, int64_t tile) const { return matrices[index(tile)]; }
  RECYCLE_DEVICE int64_t panel(int64_t tile) const {
    const int i = index(tile);
    return i == 0 ? tile : tile - ends[i - 1];
  }
  RECYCLE_DEVICE void epilogue(State&, int row, int64_t tile, int output, const float (&values)[1]) const {
    const int i = index(tile);
    const int64_t n = panel(tile) * kPanelRows + output;
    outs[i][row * matrices[i].n + n] = biases[i] != nullptr ? values[0] + biases[i][n] : values[0];
  }
};

}  // namespace

void qkv(Launcher& launcher, const Stack& stack, const Layer& layer, const GemvInput& x, float* q, float* k, float* v) {
  const int64_t q_end = n_panels(layer.q.n);
  const int64_t k_end = q_end + n_panels(layer.k.n);
  const int64_t v_end = k_end + n_panels(layer.v.n);
  launch_gemv(launcher, QkvParams{{stack.hidden, v_end, x},
                                  {layer.q, layer.k, layer.v},
                                  {layer.q_bias, layer.k_bias, layer.v_bias},
                                  {q, k, v},
                                  {q_end, k_end}});
}

}  // namespace recycle::cuda
