// Compiles the kernels for one instruction set: each kernels_<isa>.cpp includes this file once, after its simd_*.h.
// Everything but the table is in an unnamed namespace. The linker could otherwise replace a function of the
// generic build by the same function compiled with AVX-512.
#include <cstddef>
#include <cstdint>
#include <utility>

#include "../kernels.h"
#include "gemm.h"

#include "attention.h"
#include "elementwise.h"

#define RECYCLE_NAME_OF(isa) #isa
#define RECYCLE_NAME(isa) RECYCLE_NAME_OF(isa)

namespace recycle::RECYCLE_ISA {

extern const Kernels kTable;
const Kernels kTable = {RECYCLE_NAME(RECYCLE_ISA),
                        gemm,
                        quantize,
                        rms_norm,
                        swiglu,
                        attend,
                        combine_splits,
                        argmax,
                        read_stream,
                        max_value,
                        exp_sum};

}  // namespace recycle::RECYCLE_ISA
