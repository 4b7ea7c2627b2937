// Where the time of a step goes: for each phase, how long each thread works, and how long it waits at the
// barrier that ends the phase. When off, a barrier costs one branch more; when on, two clock reads.
#pragma once

#include <cstdint>

namespace recycle {

// The work between two barriers, named at the barrier that ends it.
enum class Phase : int32_t {
  leader,      // rank 0 decides; embeddings, RoPE's angles
  qkv,         // norm, q, k and v, RoPE, append
  attention,   // scores and weighted values
  output,      // combine of the splits, o
  gate_up,     // norm, gate, up, SwiGLU
  down,        // down
  input_proj,  // the module's input projection
  head,        // output matrix and running argmax
  select,      // argmax over the threads, or sampling
};
inline constexpr int kPhases = 9;
const char* phase_name(Phase phase);

struct PhaseTime {
  double work = 0;    // seconds, mean over the threads
  double wait = 0;    // likewise
  int64_t count = 0;  // how often the phase ran
};

// Starts with empty sums, or stops; waits for the parallel() that runs.
void profile(bool on);
// The sums since profile(true): of the module's phases (is_module), or of the others. Waits likewise.
PhaseTime phase_time(Phase phase, bool is_module);

}  // namespace recycle
