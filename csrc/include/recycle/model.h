// The model as the kernels see it: views into one byte buffer, which one table of int64 describes.
//
// The table is called the plan. It is a layout table, not an execution plan. It keeps a call cheap (two tensors
// in place of 300). Offsets are bytes from the start of the buffer, -1 for "absent". Vectors are float32,
// matrices are packed as in format.h. recycle_ext/weights/plan.py writes the plan.
//
//   header   magic, version, plan length, has_module
//   base     stack, embedding (matrix), final_norm (vector), head (matrix), layers...
//   module   stack, input_proj (matrix), input_bias, embed_norm, hidden_norm, output_norm (vectors),
//            head (matrix), draft_vocab (offset of int64 ids), zero_first_embedding, layers...
//   stack    hidden, intermediate, n_layers, n_heads, n_kv_heads, head_dim, bits of rms_norm_eps,
//            inv_freq (vector)
//   layer    input_norm (vector), q, k, v (matrices), q_bias, k_bias, v_bias, q_norm, k_norm (vectors),
//            o (matrix), post_norm (vector), gate, up, down (matrices)
//   matrix   offset, format, n, k
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "recycle/format.h"

namespace recycle {

inline constexpr int64_t kPlanMagic = 0x454C435943455200;  // "\0RECYCLE" read as an integer
inline constexpr int64_t kPlanVersion = 1;

struct Layer {
  const float* input_norm;  // [hidden]; null: identity
  Matrix q, k, v;
  const float *q_bias, *k_bias, *v_bias;  // null: none
  const float *q_norm, *k_norm;           // [head_dim]; null: none
  Matrix o;
  const float* post_norm;  // [hidden]
  Matrix gate, up, down;
};

// A stack of transformer layers: the base model's, or the module's.
struct Stack {
  int64_t hidden = 0, intermediate = 0, n_layers = 0;
  int64_t n_heads = 0, n_kv_heads = 0, head_dim = 0;
  float eps = 0;
  const float* inv_freq = nullptr;  // [head_dim / 2]
  std::vector<Layer> layers;        // [n_layers]

  int64_t q_size() const { return n_heads * head_dim; }
  int64_t kv_size() const { return n_kv_heads * head_dim; }
};

struct Base {
  Stack stack;
  Matrix embedding;  // [vocab, hidden]
  const float* final_norm = nullptr;
  Matrix head;  // [vocab, hidden]; with tied weights the same bytes as the embedding
};

// RecycleGPT's recyclable module, which drafts.
struct Module {
  Stack stack;
  Matrix input_proj;  // [hidden, 2 hidden], embedding half first
  const float* input_bias = nullptr;
  const float* embed_norm = nullptr;
  const float* hidden_norm = nullptr;
  const float* output_norm = nullptr;
  Matrix head;                           // [draft vocabulary, hidden]
  const int64_t* draft_vocab = nullptr;  // token id of each row of head; null: the row is the id
  bool zero_first_embedding = false;
};

struct Model {
  Base base;
  Module module;
  bool has_module = false;
};

// Reads a plan, once for each op call: kernels only see the result. Every offset and size is checked against
// `weights_bytes`, so that no kernel reads outside the buffer. Returns null, or what is wrong. readable: false
// for weights in GPU memory, whose values (the draft vocabulary) can't be checked here.
const char* read_plan(const int64_t* plan, int64_t plan_length, const std::byte* weights, int64_t weights_bytes,
                      Model* model, bool readable = true);

}  // namespace recycle
