// One layer is five phases with a barrier after each:
//
//   1  RMSNorm, q, k and v, RoPE, append   products, k = hidden
//   2  attention, split by split
//   3  merge of the splits, then o         product, k = heads * head_dim, added to the residual
//   4  RMSNorm, then gate, up and SwiGLU   products, k = hidden
//   5  down                                product, k = intermediate, added to the residual
//
// Bounded by reading the weights in 1, 3, 4 and 5. Threads share out whole heads of q and k, so that each
// can rotate what it computed, and else panels of outputs, so that no two of them add to the same
// number. What comes before a product (norms, the merge) each thread does for itself: 600
// multiplications cost less than one more barrier.
// Each product is told what its thread reads after the next barrier, so that memory has work while threads
// wait, merge and normalise.
// Every output of a row is computed by the same operations in the same order whatever the number of rows
// and threads.
#include "transformer.h"

namespace recycle {

void ForwardWork::take(Arena& arena, int64_t rows, const Stack& a, const Stack& b, int n_threads) {
  const auto larger = [](int64_t x, int64_t y) { return x > y ? x : y; };
  const int64_t intermediate = larger(a.intermediate, b.intermediate);
  const int64_t widest = larger(larger(a.q_size(), b.q_size()), 2 * a.hidden);
  x = arena.take<float>(rows * a.hidden);
  attention.take(arena, rows, attention_shape(a), attention_shape(b));
  activation = arena.take<float>(rows * intermediate);
  for (int t = 0; t < n_threads; ++t) {
    threads[t].take(arena, rows, larger(widest, intermediate));
    threads[t].tile2 = arena.take<float>(rows * kTileRows);
    threads[t].attend_tile =
        arena.take<float>(larger(attend_tile_floats(rows, attention_shape(a)),
                                 attend_tile_floats(rows, attention_shape(b))));
  }
}

void ThreadWork::take(Arena& arena, int64_t rows, int64_t widest) {
  input = arena.take<float>(rows * widest);
  quants = arena.take<int32_t>(rows * widest / 2);
  scales = arena.take<float>(rows * widest / kBlock);
  sums = arena.take<float>(rows * widest / kBlock);
  minus_sums = arena.take<int32_t>(rows * widest / kBlock);
  tile = arena.take<float>(rows * kTileRows);
}

Activations ThreadWork::activations(const float* x, int64_t rows, int64_t k,
                                    std::initializer_list<Format> formats) const {
  bool quantised = false;
  for (const Format format : formats) quantised = quantised || is_quantised(format);
  if (quantised) kernels().quantise(x, rows * k, quants, scales, sums, minus_sums);
  return {x, quants, scales, sums, minus_sums};
}

namespace {

// A thread's part of q, k and v: heads (k's count on from q's) and their panels.
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
    return q.begin < q.end   ? layer.q.panel(q.begin)
           : k.begin < k.end ? layer.k.panel(k.begin)
                             : layer.v.panel(v.begin);
  }
};

class LayerPass {
 public:
  LayerPass(const Team& team, const Stack& stack, const KvCache& cache, const Rows& rows,
            ForwardWork& work)
      : team_(team),
        stack_(stack),
        shape_(attention_shape(stack)),
        cache_(cache),
        rows_(rows),
        work_(work),
        own_(work.threads[team.thread]),
        qkv_(team, shape_, cache.type) {}

  void run(int64_t index, const std::byte* after_stack) {
    const Layer& layer = stack_.layers[index];
    const bool is_last = index + 1 == stack_.n_layers;
    const std::byte* after = is_last ? after_stack : qkv_.first(stack_.layers[index + 1]);

    project_qkv(layer, index);
    team_.barrier(Phase::qkv);
    attend_splits(team_, rows_, shape_, cache_, index, work_.attention, own_.attend_tile);
    team_.barrier(Phase::attention);
    merge();
    add_product(layer.o, own_.input, first_of(layer.gate));
    team_.barrier(Phase::output);
    gate_and_up(layer);
    team_.barrier(Phase::gate_up);
    add_product(layer.down, work_.activation, after);
    team_.barrier(Phase::down);
  }

 private:
  // The beginning of this thread's share of a matrix.
  const std::byte* first_of(const Matrix& matrix) const {
    return matrix.panel(team_.share(n_panels(matrix.n)).begin);
  }

  // own_.input = norm of the residual stream
  void normalise(const float* weight) {
    const int64_t hidden = stack_.hidden;
    for (int64_t row = 0; row < rows_.n; ++row) {
      const float* x = work_.x + row * hidden;
      float* out = own_.input + row * hidden;
      if (weight != nullptr) {
        kernels().rms_norm(x, weight, stack_.eps, hidden, out);
      } else {
        for (int64_t i = 0; i < hidden; ++i) out[i] = x[i];
      }
    }
  }

  void project_qkv(const Layer& layer, int64_t index) {
    normalise(layer.input_norm);
    const Activations x = own_.activations(own_.input, rows_.n, stack_.hidden,
                                           {layer.q.format, layer.k.format, layer.v.format});
    const std::byte* v = layer.v.panel(qkv_.v.begin);
    const std::byte* k = qkv_.k.begin < qkv_.k.end ? layer.k.panel(qkv_.k.begin) : v;
    project(layer.q, layer.q_bias, qkv_.q, x, k, work_.attention.q);
    project(layer.k, layer.k_bias, qkv_.k, x, v, work_.attention.k);
    project(layer.v, layer.v_bias, qkv_.v, x, first_of(layer.o), work_.attention.v);
    rotate_and_append(qkv_.heads, qkv_.v, rows_, shape_, layer.q_norm, layer.k_norm, stack_.eps,
                      cache_, index, work_.attention);
  }

  void project(const Matrix& matrix, const float* bias, Range panels, const Activations& x,
               const std::byte* then, float* out) {
    product_tiles(matrix, panels, x, rows_.n, own_, then,
                  [&](int64_t row, int64_t n, int64_t count, const float* values) {
                    float* to = out + row * matrix.n + n;
                    for (int64_t i = 0; i < count; ++i)
                      to[i] = bias != nullptr ? values[i] + bias[n + i] : values[i];
                  });
  }

  void merge() {
    for (int64_t s = 0; s < rows_.n_segments; ++s) {
      const Segment& segment = rows_.segments[s];
      for (int64_t i = 0; i < segment.n_rows; ++i)
        merge_row(shape_, work_.attention, segment.row + i, segment.position + i,
                  own_.input + (segment.row + i) * shape_.q_size());
    }
  }

  // The residual stream += matrix x
  void add_product(const Matrix& matrix, const float* x, const std::byte* then) {
    product_tiles(matrix, team_.share(n_panels(matrix.n)),
                  own_.activations(x, rows_.n, matrix.k, {matrix.format}), rows_.n, own_, then,
                  [&](int64_t row, int64_t n, int64_t count, const float* values) {
                    float* to = work_.x + row * stack_.hidden + n;
                    for (int64_t i = 0; i < count; ++i) to[i] += values[i];
                  });
  }

  void gate_and_up(const Layer& layer) {
    normalise(layer.post_norm);
    const Activations x =
        own_.activations(own_.input, rows_.n, stack_.hidden, {layer.gate.format, layer.up.format});
    const Range range = team_.share(n_panels(layer.gate.n));
    for (int64_t panel = range.begin; panel < range.end; panel += kTilePanels) {
      const int64_t left = range.end - panel;
      const int64_t count = left < kTilePanels ? left : kTilePanels;
      kernels().product(layer.gate, panel, count, x, rows_.n, layer.up.panel(panel), own_.tile);
      kernels().product(layer.up, panel, count, x, rows_.n,
                        count == left ? first_of(layer.down) : layer.gate.panel(panel + count),
                        own_.tile2);
      for (int64_t row = 0; row < rows_.n; ++row)
        kernels().swiglu(own_.tile + row * kTileRows, own_.tile2 + row * kTileRows,
                         count * kPanelRows,
                         work_.activation + row * stack_.intermediate + panel * kPanelRows);
    }
  }

  const Team& team_;
  const Stack& stack_;
  const AttentionShape shape_;
  const KvCache& cache_;
  const Rows& rows_;
  ForwardWork& work_;
  const ThreadWork& own_;
  const QkvShare qkv_;
};

}  // namespace

void forward(const Team& team, const Stack& stack, const KvCache& cache, const Rows& rows,
             const std::byte* then, ForwardWork& work) {
  LayerPass pass(team, stack, cache, rows, work);
  for (int64_t layer = 0; layer < stack.n_layers; ++layer) pass.run(layer, then);
}

const std::byte* first_weights(const Team& team, const Stack& stack, CacheType type) {
  return QkvShare(team, attention_shape(stack), type).first(stack.layers[0]);
}

}  // namespace recycle
