#define RECYCLE_ISA avxvnni
#include "simd_avxvnni.h"
#include "table.h"
