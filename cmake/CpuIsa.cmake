# The CPU kernels are one source, compiled once for each instruction set with its flags. csrc/cpu/dispatch.cpp chooses
# among them at run time. No other source gets such flags.
include(CheckCXXSourceCompiles)

# Sums have the same order on every machine: IEEE arithmetic, no multiplication fused with an addition unless the source
# says so, and no instruction set but the one that a file is compiled for. The last flag counts, so these come after
# those of CXXFLAGS (-Ofast, -ffast-math and its parts, -march=native). The linker has them too: for -ffast-math, GCC links
# code that flushes denormal numbers to zero.
set(RECYCLE_EXACT_FLAGS -O3 -fno-fast-math -fno-associative-math -fno-reciprocal-math -fno-finite-math-only
  -fsigned-zeros -ffp-contract=off)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND RECYCLE_EXACT_FLAGS -march=x86-64)
endif()
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
  list(APPEND RECYCLE_EXACT_FLAGS -fno-unsafe-math-optimizations)  # Clang's would also change how exceptions are treated
endif()

function(recycle_cpu_options target)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/csrc/include)
  target_compile_options(${target} PRIVATE ${RECYCLE_EXACT_FLAGS} -Wall -Wextra)
  target_link_options(${target} PRIVATE ${RECYCLE_EXACT_FLAGS})
endfunction()

# Adds csrc/cpu/kernels/kernels_*.cpp to `target`, and defines RECYCLE_HAVE_* for each: generic always, the others if
# the target processor is x86-64 and the compiler knows their flags. Sets RECYCLE_CPU_TARGETS.
function(recycle_add_isa_kernels target)
  set(added generic)
  set(folder ${PROJECT_SOURCE_DIR}/csrc/cpu/kernels)
  target_sources(${target} PRIVATE ${folder}/kernels_generic.cpp)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    set(flags_avx2 -mavx2 -mfma -mf16c)
    set(flags_avxvnni ${flags_avx2} -mavxvnni)
    set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni)
    # What the compiler calls the newest part of each, where dispatch.cpp asks the processor.
    set(newest_avx2 avx2)
    set(newest_avxvnni avxvnni)
    set(newest_avx512 avx512vnni)
    foreach(isa avx2 avxvnni avx512)
      string(TOUPPER ${isa} upper)
      list(JOIN flags_${isa} " " CMAKE_REQUIRED_FLAGS)
      check_cxx_source_compiles(
        "#include <immintrin.h>\nint main() { return __builtin_cpu_supports(\"${newest_${isa}}\"); }"
        RECYCLE_COMPILER_HAS_${upper})
      if(RECYCLE_COMPILER_HAS_${upper})
        if(isa STREQUAL avx512 AND CMAKE_CXX_COMPILER_ID STREQUAL GNU)
          # GCC warns about its own _mm512_undefined_ps (GCC bug 105593).
          list(APPEND flags_avx512 -Wno-uninitialized -Wno-maybe-uninitialized)
        endif()
        target_sources(${target} PRIVATE ${folder}/kernels_${isa}.cpp)
        set_source_files_properties(${folder}/kernels_${isa}.cpp PROPERTIES
          COMPILE_OPTIONS "${flags_${isa}}")
        target_compile_definitions(${target} PRIVATE RECYCLE_HAVE_${upper})
        list(APPEND added ${isa})
      endif()
    endforeach()
  endif()
  list(JOIN added " " added)
  set(RECYCLE_CPU_TARGETS "${added}" PARENT_SCOPE)
endfunction()
