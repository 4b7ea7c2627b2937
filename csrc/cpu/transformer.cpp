// One layer is five phases with a barrier after each:
//
//   1  RMSNorm, q, k and v, RoPE, append   matmuls, k = hidden
//   2  attention, split by split
//   3  combine of the splits, o            matmul, k = heads * head_dim, added to the residual stream
//   4  RMSNorm, gate, up, SwiGLU           matmuls, k = hidden
//   5  down                                matmul, k = intermediate, added to the residual stream
//
// Bounded by reading the weights in 1, 3, 4 and 5. Threads share whole heads of q and k, because a thread rotates the
// heads that it computed, and else panels of outputs, so that no two threads add to the same number. Norms and
// the combine come before a matmul, and each thread repeats them: 600 multiplications cost less than a barrier.
// Each matmul prefetches what its thread reads after the next barrier, so memory is busy while threads wait, combine
// and normalize.
// Every output of a row is computed by the same operations in the same order for any number of rows and threads.
#include "transformer.h"

#include <algorithm>

namespace recycle {

void ForwardWork::take(Arena& arena, int64_t rows, const Stack& a, const Stack& b, int n_threads) {
  const int64_t intermediate = std::max(a.intermediate, b.intermediate);
  const int64_t widest = std::max({a.q_size(), b.q_size(), 2 * a.hidden, intermediate});
  x = arena.take<float>(rows * a.hidden);
  attention.take(arena, rows, attention_shape(a), attention_shape(b));
  activation = arena.take<float>(rows * intermediate);
  for (int t = 0; t < n_threads; ++t) {
    threads[t].take(arena, rows, widest);
    threads[t].tile2 = arena.take<float>(rows * kTileRows);
    threads[t].attend_tile = arena.take<float>(
        std::max(attend_tile_floats(rows, attention_shape(a)), attend_tile_floats(rows, attention_shape(b))));
  }
}

void ThreadScratch::take(Arena& arena, int64_t rows, int64_t widest) {
  input = arena.take<float>(rows * widest);
  const int64_t blocks = rows * widest / kBlock;
  quantized = {arena.take<int32_t>(rows * widest / 2),
               arena.take<float>(blocks),
               arena.take<float>(blocks),
               arena.take<int32_t>(blocks),
               arena.take<float>(blocks * 2),
               arena.take<int32_t>(blocks * 2)};
  tile = arena.take<float>(rows * kTileRows);
}

Activations ThreadScratch::activations(const float* x, int64_t rows, int64_t k,
                                       std::initializer_list<Format> formats) const {
  if (std::any_of(formats.begin(), formats.end(), is_quantized)) kernels().quantize(x, rows * k, quantized);
  return {quantized, x};
}

namespace {

// A thread's share of q, k and v: heads (those of k are numbered after those of q) and panels.
struct QkvShare {
  Range heads, q, k, v;

  QkvShare(const Team& team, const AttentionShape& shape, CacheType type)
      : heads(team.share(shape.n_heads + shape.n_kv_heads)), v(share_v(team, shape, type)) {
    const int64_t panels = shape.head_dim / kPanelRows;  // of a head
    const auto of_q = [&](int64_t head) { return head < shape.n_heads ? head : shape.n_heads; };
    q = {of_q(heads.begin) * panels, of_q(heads.end) * panels};
    k = {heads.begin * panels - q.begin, heads.end * panels - q.end};
  }
  const std::byte* first(const Layer& layer) const {
    return q.begin < q.end ? layer.q.panel(q.begin) : k.begin < k.end ? layer.k.panel(k.begin) : layer.v.panel(v.begin);
  }
};

class LayerPass {
 public:
  LayerPass(const Team& team, const Stack& stack, const KvCache& cache, const Rows& rows, ForwardWork& work)
      : team_(team),
        stack_(stack),
        shape_(attention_shape(stack)),
        cache_(cache),
        rows_(rows),
        work_(work),
        scratch_(work.threads[team.thread]),
        qkv_(team, shape_, cache.type) {}

  void run(int64_t index, const std::byte* next) {
    const Layer& layer = stack_.layers[index];
    const bool is_last = index + 1 == stack_.n_layers;
    const std::byte* next_layer = is_last ? next : qkv_.first(stack_.layers[index + 1]);

    run_qkv(layer, index);
    team_.barrier(Phase::qkv);
    attend_splits(team_, rows_, shape_, cache_, index, work_.attention, scratch_.attend_tile);
    team_.barrier(Phase::attention);
    combine();
    add_linear(layer.o, scratch_.input, first_of(layer.gate));
    team_.barrier(Phase::output);
    run_gate_up(layer);
    team_.barrier(Phase::gate_up);
    add_linear(layer.down, work_.activation, next_layer);
    team_.barrier(Phase::down);
  }

 private:
  // The first weights of this thread's share of a matrix.
  const std::byte* first_of(const Matrix& matrix) const { return matrix.panel(team_.share(n_panels(matrix.n)).begin); }

  // scratch.input = norm of the residual stream
  void rms_norm(const float* weight) {
    const int64_t hidden = stack_.hidden;
    for (int64_t row = 0; row < rows_.n; ++row) {
      const float* x = work_.x + row * hidden;
      float* out = scratch_.input + row * hidden;
      if (weight != nullptr) {
        kernels().rms_norm(x, weight, stack_.eps, hidden, out);
      } else {
        for (int64_t i = 0; i < hidden; ++i) out[i] = x[i];
      }
    }
  }

  void run_qkv(const Layer& layer, int64_t index) {
    rms_norm(layer.input_norm);
    const Activations x =
        scratch_.activations(scratch_.input, rows_.n, stack_.hidden, {layer.q.format, layer.k.format, layer.v.format});
    const std::byte* v = layer.v.panel(qkv_.v.begin);
    const std::byte* k = qkv_.k.begin < qkv_.k.end ? layer.k.panel(qkv_.k.begin) : v;
    const auto run = [&](const Matrix& matrix, const float* bias, Range panels, const std::byte* next, float* out) {
      linear_bias(matrix, bias, panels, x, rows_.n, scratch_, next, out);
    };
    run(layer.q, layer.q_bias, qkv_.q, k, work_.attention.q);
    run(layer.k, layer.k_bias, qkv_.k, v, work_.attention.k);
    run(layer.v, layer.v_bias, qkv_.v, first_of(layer.o), work_.attention.v);
    rotate_and_append(qkv_.heads, qkv_.v, rows_, shape_, layer.q_norm, layer.k_norm, stack_.eps, cache_, index,
                      work_.attention);
  }

  void combine() {
    for_each_row(rows_, {0, rows_.n}, [&](const Segment&, int64_t row, int64_t position) {
      combine_row(shape_, work_.attention, row, position, scratch_.input + row * shape_.q_size());
    });
  }

  // Residual stream += matrix x
  void add_linear(const Matrix& matrix, const float* x, const std::byte* next) {
    linear(matrix, team_.share(n_panels(matrix.n)), scratch_.activations(x, rows_.n, matrix.k, {matrix.format}),
           rows_.n, scratch_, next, [&](int64_t row, int64_t n, int64_t count, const float* values) {
             float* to = work_.x + row * stack_.hidden + n;
             for (int64_t i = 0; i < count; ++i) to[i] += values[i];
           });
  }

  void run_gate_up(const Layer& layer) {
    rms_norm(layer.post_norm);
    const Activations x =
        scratch_.activations(scratch_.input, rows_.n, stack_.hidden, {layer.gate.format, layer.up.format});
    const Range range = team_.share(n_panels(layer.gate.n));
    for (int64_t panel = range.begin; panel < range.end; panel += kTilePanels) {
      const int64_t left = range.end - panel;
      const int64_t count = left < kTilePanels ? left : kTilePanels;
      kernels().gemm(layer.gate, panel, count, x, rows_.n, layer.up.panel(panel), scratch_.tile);
      kernels().gemm(layer.up, panel, count, x, rows_.n,
                     count == left ? first_of(layer.down) : layer.gate.panel(panel + count), scratch_.tile2);
      for (int64_t row = 0; row < rows_.n; ++row)
        kernels().swiglu(scratch_.tile + row * kTileRows, scratch_.tile2 + row * kTileRows, count * kPanelRows,
                         work_.activation + row * stack_.intermediate + panel * kPanelRows);
    }
  }

  const Team& team_;
  const Stack& stack_;
  const AttentionShape shape_;
  const KvCache& cache_;
  const Rows& rows_;
  ForwardWork& work_;
  const ThreadScratch& scratch_;
  const QkvShare qkv_;
};

}  // namespace

void forward(const Team& team, const Stack& stack, const KvCache& cache, const Rows& rows, const std::byte* next,
             ForwardWork& work) {
  LayerPass pass(team, stack, cache, rows, work);
  for (int64_t layer = 0; layer < stack.n_layers; ++layer) pass.run(layer, next);
}

const std::byte* first_weights(const Team& team, const Stack& stack, CacheType type) {
  return QkvShare(team, attention_shape(stack), type).first(stack.layers[0]);
}

}  // namespace recycle
