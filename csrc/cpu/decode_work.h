// The scratch of a decode step, shared by its threads.
#pragma once

#include <cstdint>

#include "lm_head.h"
#include "recycle/decode_step.h"
#include "rows.h"
#include "transformer.h"

namespace recycle {

// Rows: those of the pass that runs. n: positions in the base model's cache.
struct DecodeWork {
  ForwardWork forward;
  HeadWork head;
  float* hidden;        // [rows, hidden] the base model's last hidden states, after its final norm
  float* module_input;  // [rows, 2 hidden] embedding, hidden state
  Rows rows;
  int64_t* tokens;   // [rows] embedded tokens: a base row's own, or the one after a module row
  int64_t* source;   // [rows] row of the hidden state that a module row or a head row takes
  int64_t* pending;  // [batch, k + 1] the next ones, until the step has succeeded
  int64_t* grown;    // [batch] by how many tokens a sequence grows
  int64_t*
      skipped;  // [batch] positions after this step that the base model has and the module lacks
  Status status;

  void take(Arena& arena, const Model& model, int64_t batch, int64_t num_draft_tokens, bool greedy,
            int n_threads);
};

}  // namespace recycle
