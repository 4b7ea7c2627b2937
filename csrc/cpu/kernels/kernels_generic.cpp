#define RECYCLE_ISA generic
#include "simd_generic.h"
#include "table.h"
