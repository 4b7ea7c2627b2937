// The kernels between the passes of a decode step: which rows run, which draft tokens are accepted, what the module
// reads.
// The shape of a step is the same whatever is accepted: unused rows have position -1.
#pragma once

#include "kernels.h"

namespace recycle::cuda {

// Scratch of a step. rows: batch * rows_per_sequence.
struct SelectBuffers {
  float* x;               // [rows, hidden] the base model's residual stream
  float* module_x;        // [rows, hidden] the module's residual stream
  float* module_input;    // [rows, 2 hidden] embedding of the next token, hidden state
  int* positions;         // [rows] of the base model's rows; then of the module's first pass
  int* head_rows;         // [rows] rows of x that the base model's head reads
  int* draft_rows;        // [batch] rows of module_x that the module's head reads
  int* draft_positions;   // [batch] of the module's rows after its first pass
  int64_t* new_pending;   // [rows] pending tokens, until the step is known to succeed
  unsigned* blocks_done;  // [n_counters] of attention
  int n_counters;
  // Sampled steps only. probs hold logits first. finite: 0 for a row with a nonfinite logit.
  float* base_probs;    // [rows of the base model's head, vocabulary]
  int* base_finite;     // [rows of the base model's head]
  float* module_probs;  // [num_draft_tokens, batch, draft vocabulary]
  int* module_finite;   // [batch]
};

// Parameters of all kernels of select.cu.
struct SelectParams {
  SelectBuffers buffers;
  int64_t *pending, *lengths, *module_lengths;  // DecodeState's
  int64_t* tokens;                              // [batch, rows_per_sequence] the op's results
  int64_t* counts;                              // [batch] the op's results
  Matrix embedding;
  const float* final_norm;
  float base_eps;
  int64_t hidden, vocab, capacity;
  int batch, num_draft_tokens, rows_per_sequence;
  int prefill_sequence;       // the sequence whose prefill ends, see finish_prefill(); -1: none
  int last_row;               // the last used row of a sequence in the base model's pass
  bool head_reads_every_row;  // else only the last row of each sequence
  bool is_sampled;
  const int64_t* seeds;
  // The module's; unset without draft tokens.
  const float *embed_norm, *hidden_norm;
  const int64_t* draft_vocab;
  int64_t draft_vocab_size;
  float* draft_probs;  // [batch, num_draft_tokens, draft vocabulary]; sampled verify mode only
  float module_eps;
  bool zero_first_embedding;
  // Of one launch.
  PartialArgmax partial;
  int draft;
};

SelectParams select_params(const DecodeState& state, int prefill_sequence, const SelectBuffers& buffers,
                           int64_t* tokens, int64_t* counts);

// Positions, embeddings of the pending tokens, counters.
void begin_step(Launcher& launcher, const SelectParams& params);
// From the base head's partial argmax or probabilities: tokens, counts, and the inputs of the module's first pass.
void select_tokens(Launcher& launcher, SelectParams params, const PartialArgmax& partial);
// From the module head's: draft token `draft` (from 0), and the inputs of the module's next pass, or the new state.
void select_draft(Launcher& launcher, SelectParams params, const PartialArgmax& partial, int draft);

}  // namespace recycle::cuda
