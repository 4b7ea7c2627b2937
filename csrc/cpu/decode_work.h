// The scratch of a decode step, shared by its threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lm_head.h"
#include "recycle/decode_step.h"
#include "rows.h"
#include "transformer.h"

namespace recycle {

// `rows` in a shape: the maximum number of rows of any pass.
struct DecodeWork {
  ForwardWork forward;
  HeadWork head;
  float* hidden;        // [rows, hidden] the base model's last hidden states, after its final norm
  float* module_input;  // [rows, 2 hidden] embedding, hidden state
  Rows rows;
  int64_t* tokens;   // [rows] embedded tokens: a base row's own, or the one after a module row
  int64_t* source;   // [rows] row of the hidden state that a module row or a head row takes
  int64_t* pending;  // [batch, k + 1] the next ones, until the step has succeeded
  int64_t* grown;    // [batch] by how many tokens a sequence grows; below 0: why it failed (kNotFinite, ...)
  int64_t* skipped;  // [batch] positions that only the base model has, after this step

  void take(Arena& arena, const Model& model, int64_t batch, int64_t num_draft_tokens, bool greedy, int n_threads) {
    const Stack& base = model.base.stack;
    const Stack& module = model.has_module ? model.module.stack : base;
    const int64_t head_rows = batch * (num_draft_tokens + 1);
    const int64_t max_rows = std::max(head_rows, kPrefillRows);
    forward.take(arena, max_rows, base, module, n_threads);
    head.take(arena, head_rows, model.base.head.n, greedy, false, n_threads);
    hidden = arena.take<float>(max_rows * base.hidden);
    module_input = arena.take<float>(model.has_module ? max_rows * 2 * base.hidden : 0);
    rows.segments = arena.take<Segment>(batch);
    tokens = arena.take<int64_t>(max_rows);
    source = arena.take<int64_t>(max_rows);
    pending = arena.take<int64_t>(head_rows);
    grown = arena.take<int64_t>(batch);
    skipped = arena.take<int64_t>(batch);
  }
};

}  // namespace recycle
