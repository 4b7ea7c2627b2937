// What happens between the passes of a decode step, a sequence a block: which rows run, what counts, what the
// module sees. The step has one shape whatever was accepted: rows that are not in use have position -1.
#pragma once

#include "kernels.h"

namespace recycle::cuda {

// Reported in counts, for a sequence whose state is then as it was.
inline constexpr int64_t kNonFinite = -1;  // a logit was NaN or infinite
inline constexpr int64_t kNoRoom = -2;     // a length of it or a pending token is out of range

struct SequenceArrays {
  float* x;              // [rows, hidden] the base's residual stream
  float* module_x;       // [rows, hidden] the module's
  float* pair;           // [rows, 2 hidden] the module's inputs
  int* positions;        // [rows] of the base's rows; then the module's own, of those it sees
  int* head_rows;        // [rows] rows of x that the base's head sees, in order
  int* draft_rows;       // [batch] rows of module_x that its head sees
  int* draft_positions;  // [batch] of the module's rows after its first pass
  int64_t* new_pending;  // [batch, width] until the step is known to succeed
  int64_t* grown;        // [batch] tokens by which a sequence grows; kNonFinite, kNoRoom; 0: idle
  unsigned* arrived;     // attention's counters
  int n_arrived;
  // Sampled only: distributions in the place of logits, and whether all logits of their rows were finite.
  float* base_probs;    // [rows of the base's head, vocabulary]
  int* base_finite;     // [rows]
  float* module_probs;  // [batch, draft vocabulary]
  int* module_finite;   // [batch]
};

struct SequenceCall {
  const Model* model = nullptr;  // the host's; kernels get what they need of it
  DecodeState state;
  int64_t capacity = 0;
  int first_of =
      -1;  // the sequence whose prompt ends with this step, see finish_prefill() in step.h; -1: none
  SequenceArrays arrays;
  int64_t* tokens = nullptr;  // [batch, width] the op's results
  int64_t* counts = nullptr;  // [batch]
};

// Positions, embeddings of the pending tokens, counters.
void begin_step(Launcher& launcher, const SequenceCall& call);
// From the base head's bests, or its distributions, to what each sequence grows by, and the module's inputs.
void choose(Launcher& launcher, const SequenceCall& call, const HeadBests& bests);
// From the module head's to draft `draft` + 1, and the inputs of the module's next pass, or the new state.
void take_draft(Launcher& launcher, const SequenceCall& call, const HeadBests& bests, int draft);

}  // namespace recycle::cuda
