#include <bit>

#include "recycle/model.h"

namespace recycle {

namespace {

constexpr int64_t kMatrixFields = 4;
constexpr int64_t kLayerFields = 1 + 3 * kMatrixFields + 5 + kMatrixFields + 1 + 3 * kMatrixFields;

// Walks through the table; the first thing found wrong is kept in `error`.
class Reader {
 public:
  Reader(const int64_t* plan, int64_t length, const std::byte* weights, int64_t weights_bytes)
      : plan_(plan), length_(length), weights_(weights), weights_bytes_(weights_bytes) {}

  int64_t next() {
    if (at_ >= length_) {
      fail("the plan is too short");
      return 0;
    }
    return plan_[at_++];
  }

  int64_t size(int64_t most) {
    const int64_t value = next();
    if (value < 0 || value > most) fail("a size in the plan is out of range");
    return error == nullptr ? value : 0;
  }

  template <class T>
  const T* vector(int64_t n, bool optional) {
    const int64_t offset = next();
    if (offset == -1) {
      if (!optional) fail("the plan lacks a vector it needs");
      return nullptr;
    }
    return fits(offset, n * static_cast<int64_t>(sizeof(T)))
               ? reinterpret_cast<const T*>(weights_ + offset)
               : nullptr;
  }

  Matrix matrix(int64_t n, int64_t k) {
    const int64_t offset = next();
    const int64_t format = next();
    Matrix matrix;
    matrix.n = next();
    matrix.k = next();
    if (error != nullptr) return matrix;
    if (format < 0 || format >= kFormats) {
      fail("the plan names an unknown weight format");
      return matrix;
    }
    matrix.format = static_cast<Format>(format);
    if (matrix.n != n || matrix.k != k || k % k_multiple(matrix.format) != 0) {
      fail("a matrix in the plan has the wrong size");
      return matrix;
    }
    if (fits(offset, matrix_bytes(matrix.format, n, k))) matrix.data = weights_ + offset;
    return matrix;
  }

  Stack stack() {
    constexpr int64_t kMost = int64_t{1} << 24;
    Stack stack;
    stack.hidden = size(kMost);
    stack.intermediate = size(kMost);
    stack.n_layers = size(kMost);
    stack.n_heads = size(kMost);
    stack.n_kv_heads = size(kMost);
    stack.head_dim = size(256);
    stack.eps = std::bit_cast<float>(static_cast<int32_t>(next()));
    stack.inv_freq = vector<float>(stack.head_dim / 2, false);
    stack.weights = weights_;
    if (error == nullptr &&
        (stack.hidden <= 0 || stack.hidden % kPanelRows != 0 || stack.intermediate <= 0 ||
         stack.intermediate % kPanelRows != 0 || stack.n_layers <= 0 || stack.head_dim <= 0 ||
         stack.head_dim % kPanelRows != 0 || stack.n_kv_heads <= 0 ||
         stack.n_heads < stack.n_kv_heads || stack.n_heads % stack.n_kv_heads != 0))
      fail("the plan's layer sizes don't fit together");
    return stack;
  }

  Layer layer(const Stack& stack) {
    Layer layer;
    layer.input_norm = vector<float>(stack.hidden, true);
    layer.q = matrix(stack.q_size(), stack.hidden);
    layer.k = matrix(stack.kv_size(), stack.hidden);
    layer.v = matrix(stack.kv_size(), stack.hidden);
    layer.q_bias = vector<float>(stack.q_size(), true);
    layer.k_bias = vector<float>(stack.kv_size(), true);
    layer.v_bias = vector<float>(stack.kv_size(), true);
    layer.q_norm = vector<float>(stack.head_dim, true);
    layer.k_norm = vector<float>(stack.head_dim, true);
    layer.o = matrix(stack.hidden, stack.q_size());
    layer.post_norm = vector<float>(stack.hidden, false);
    layer.gate = matrix(stack.intermediate, stack.hidden);
    layer.up = matrix(stack.intermediate, stack.hidden);
    layer.down = matrix(stack.hidden, stack.intermediate);
    return layer;
  }

  void layers(Stack* stack) {
    stack->layer_table = plan_ + at_;
    for (int64_t i = 0; i < stack->n_layers && error == nullptr; ++i) layer(*stack);
  }

  void fail(const char* message) {
    if (error == nullptr) error = message;
  }

  bool at_end() const { return at_ == length_; }

  const char* error = nullptr;

 private:
  bool fits(int64_t offset, int64_t bytes) {
    const bool inside = offset >= 0 && offset % kAlign == 0 && offset <= weights_bytes_ &&
                        bytes <= weights_bytes_ - offset;
    if (!inside) fail("the plan points outside the weights");
    return inside;
  }

  const int64_t* plan_;
  int64_t length_;
  const std::byte* weights_;
  int64_t weights_bytes_;
  int64_t at_ = 0;
};

}  // namespace

Layer Stack::layer(int64_t index) const {
  // read_plan() has checked every field against the buffer.
  Reader reader(layer_table + index * kLayerFields, kLayerFields, weights, INT64_MAX);
  return reader.layer(*this);
}

const char* read_plan(const int64_t* plan, int64_t plan_length, const std::byte* weights,
                      int64_t weights_bytes, Model* model, bool readable) {
  constexpr int64_t kMostVocab = int64_t{1} << 31;
  Reader reader(plan, plan_length, weights, weights_bytes);
  if (reader.next() != kPlanMagic) return "it is not a plan made by recycle_ext.weights";
  if (reader.next() != kPlanVersion) return "the plan was made by another version of recycle_ext";
  if (reader.next() != plan_length) return "the plan is cut off";
  model->has_module = reader.next() != 0;

  Base& base = model->base;
  base.stack = reader.stack();
  const int64_t vocab = reader.size(kMostVocab);
  base.embedding = reader.matrix(vocab, base.stack.hidden);
  base.final_norm = reader.vector<float>(base.stack.hidden, false);
  base.head = reader.matrix(vocab, base.stack.hidden);
  reader.layers(&base.stack);
  if (model->has_module && reader.error == nullptr) {
    Module& module = model->module;
    module.stack = reader.stack();
    const int64_t hidden = module.stack.hidden;
    if (hidden != base.stack.hidden) reader.fail("the module is not as wide as the base model");
    module.input_proj = reader.matrix(hidden, 2 * hidden);
    module.input_bias = reader.vector<float>(hidden, true);
    module.embed_norm = reader.vector<float>(hidden, true);
    module.hidden_norm = reader.vector<float>(hidden, true);
    module.output_norm = reader.vector<float>(hidden, true);
    const int64_t draft_vocab = reader.size(vocab);
    module.head = reader.matrix(draft_vocab, hidden);
    module.draft_vocab = reader.vector<int64_t>(draft_vocab, true);
    module.zero_first_embedding = reader.next() != 0;
    if (module.draft_vocab == nullptr && draft_vocab != vocab)
      reader.fail("the module's head is not as tall as the vocabulary");
    if (readable && reader.error == nullptr && module.draft_vocab != nullptr)
      for (int64_t i = 0; i < draft_vocab; ++i)
        if (module.draft_vocab[i] < (i == 0 ? 0 : module.draft_vocab[i - 1] + 1) ||
            module.draft_vocab[i] >= vocab)
          reader.fail("the draft vocabulary is not ascending token ids");
    reader.layers(&module.stack);
  }
  if (reader.error == nullptr && !reader.at_end()) reader.fail("the plan is too long");
  return reader.error;
}

}  // namespace recycle
