// Reads the plan (model.h). Both backends compile this file.
#include <bit>

#include "recycle/model.h"

namespace recycle {

namespace {

// Reads the table field by field; `error` keeps the first problem.
class Reader {
 public:
  Reader(const int64_t* plan, int64_t length, const std::byte* weights, int64_t weights_bytes)
      : plan_(plan), length_(length), weights_(weights), weights_bytes_(weights_bytes) {}

  int64_t next() {
    if (at_ < length_) return plan_[at_++];
    fail("the plan is too short");
    return 0;
  }

  int64_t size(int64_t max) {
    const int64_t value = next();
    if (value < 0 || value > max) fail("a size in the plan is out of range");
    return error == nullptr ? value : 0;
  }

  template <class T>
  const T* vector(int64_t n, bool optional) {
    const int64_t offset = next();
    if (offset == -1) {
      if (!optional) fail("the plan lacks a vector it needs");
      return nullptr;
    }
    return fits(offset, n * static_cast<int64_t>(sizeof(T))) ? reinterpret_cast<const T*>(weights_ + offset) : nullptr;
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
    constexpr int64_t kMaxSize = int64_t{1} << 24;
    Stack stack;
    stack.hidden = size(kMaxSize);
    stack.intermediate = size(kMaxSize);
    stack.n_layers = size(kMaxSize);
    stack.n_heads = size(kMaxSize);
    stack.n_kv_heads = size(kMaxSize);
    stack.head_dim = size(256);
    stack.eps = std::bit_cast<float>(static_cast<int32_t>(next()));
    stack.inv_freq = vector<float>(stack.head_dim / 2, false);
    if (error == nullptr && (stack.hidden <= 0 || stack.hidden % kPanelRows != 0 || stack.intermediate <= 0 ||
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
    for (int64_t i = 0; i < stack->n_layers && error == nullptr; ++i) stack->layers.push_back(layer(*stack));
  }

  void base(Base* base) {
    base->stack = stack();
    const int64_t vocab = size(int64_t{1} << 31);
    base->embedding = matrix(vocab, base->stack.hidden);
    base->final_norm = vector<float>(base->stack.hidden, false);
    base->head = matrix(vocab, base->stack.hidden);
    layers(&base->stack);
  }

  void module(const Base& base, bool readable, Module* module) {
    module->stack = stack();
    const int64_t hidden = module->stack.hidden;
    const int64_t vocab = base.head.n;
    if (hidden != base.stack.hidden) fail("the module's hidden size is not the base model's");
    module->input_proj = matrix(hidden, 2 * hidden);
    module->input_bias = vector<float>(hidden, true);
    module->embed_norm = vector<float>(hidden, true);
    module->hidden_norm = vector<float>(hidden, true);
    module->output_norm = vector<float>(hidden, true);
    const int64_t draft_vocab = size(vocab);
    module->head = matrix(draft_vocab, hidden);
    module->draft_vocab = vector<int64_t>(draft_vocab, true);
    module->zero_first_embedding = next() != 0;
    const int64_t* ids = module->draft_vocab;
    if (ids == nullptr && draft_vocab != vocab) fail("the module's head is not as tall as the vocabulary");
    if (readable && error == nullptr && ids != nullptr)
      for (int64_t i = 0; i < draft_vocab; ++i)
        if (ids[i] < (i == 0 ? 0 : ids[i - 1] + 1) || ids[i] >= vocab)
          fail("the draft vocabulary is not ascending token ids");
    layers(&module->stack);
  }

  void fail(const char* message) {
    if (error == nullptr) error = message;
  }

  bool at_end() const { return at_ == length_; }

  const char* error = nullptr;

 private:
  bool fits(int64_t offset, int64_t bytes) {
    const bool inside =
        offset >= 0 && offset % kAlign == 0 && offset <= weights_bytes_ && bytes <= weights_bytes_ - offset;
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

const char* read_plan(const int64_t* plan, int64_t plan_length, const std::byte* weights, int64_t weights_bytes,
                      Model* model, bool readable) {
  Reader reader(plan, plan_length, weights, weights_bytes);
  if (reader.next() != kPlanMagic) return "it is not a plan made by recycle_ext.weights";
  if (reader.next() != kPlanVersion) return "the plan was made by another version of recycle_ext";
  if (reader.next() != plan_length) return "the plan is cut off";
  model->has_module = reader.next() != 0;

  reader.base(&model->base);
  if (model->has_module && reader.error == nullptr) reader.module(model->base, readable, &model->module);
  if (reader.error == nullptr && !reader.at_end()) reader.fail("the plan is too long");
  return reader.error;
}

}  // namespace recycle
