# The CUDA backend, a library of its own: librecycle_cuda.so, which recycle_ext loads where torch has CUDA.
# RECYCLE_CUDA: AUTO builds it if there is a CUDA compiler, ON fails if there is none, OFF never looks for one.
#
# The library links the CUDA runtime statically, so that it also builds against a torch without CUDA.
# Sets RECYCLE_CUDA_STATUS.
set(RECYCLE_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set(RECYCLE_CUDA_ARCHITECTURES "" CACHE STRING
  "As CMAKE_CUDA_ARCHITECTURES; empty: the GPU of this machine, or sm_80, sm_90a and PTX where there is none")
if(NOT RECYCLE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "RECYCLE_CUDA is '${RECYCLE_CUDA}'; it must be AUTO, ON or OFF")
endif()

set(RECYCLE_CUDA_FOUND FALSE)
set(RECYCLE_CUDA_COMPILER "none found")
if(RECYCLE_CUDA STREQUAL OFF)
  set(RECYCLE_CUDA_STATUS "off (RECYCLE_CUDA=OFF)")
else()
  find_program(_nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin NO_CACHE)
  if(_nvcc)
    execute_process(COMMAND ${_nvcc} --version OUTPUT_VARIABLE _version ERROR_QUIET)
    string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${_version}")
    set(RECYCLE_CUDA_COMPILER "${_nvcc} (${CMAKE_MATCH_1})")
    if(CMAKE_MATCH_1 VERSION_LESS 12.3)
      # Older ones lack C++20, and overlapping launches inside a CUDA graph.
      set(RECYCLE_CUDA_STATUS "off (CUDA 12.3 or newer is needed)")
    else()
      set(RECYCLE_CUDA_FOUND TRUE)
      if(RECYCLE_CUDA STREQUAL AUTO)
        set(ENV{CUDACXX} ${_nvcc})
        include(CheckLanguage)
        check_language(CUDA)
        if(NOT CMAKE_CUDA_COMPILER)
          set(RECYCLE_CUDA_FOUND FALSE)
          set(RECYCLE_CUDA_STATUS "off (this CUDA compiler doesn't work with this C++ compiler)")
        endif()
      endif()
    endif()
  else()
    set(RECYCLE_CUDA_STATUS "off (no CUDA compiler found)")
  endif()
  if(RECYCLE_CUDA STREQUAL ON AND NOT RECYCLE_CUDA_FOUND)
    message(FATAL_ERROR "RECYCLE_CUDA=ON, but no CUDA compiler of version 12.3 or newer was found "
      "(${RECYCLE_CUDA_COMPILER}); put nvcc on the PATH or set CUDA_HOME")
  endif()
endif()

if(RECYCLE_CUDA_FOUND)
  set(CMAKE_CUDA_COMPILER ${_nvcc})
  if(RECYCLE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES "${RECYCLE_CUDA_ARCHITECTURES}")
  else()
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE _gpus ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _no_gpu)
    if(NOT _no_gpu AND _gpus MATCHES "^[0-9]+\\.[0-9]")
      string(REPLACE "." "" _gpus "${_gpus}")
      string(REGEX REPLACE "[\r\n]+" ";" _gpus "${_gpus}")
      list(REMOVE_DUPLICATES _gpus)
      list(TRANSFORM _gpus REPLACE "^90$" "90a")
      list(TRANSFORM _gpus APPEND "-real")
      set(CMAKE_CUDA_ARCHITECTURES "${_gpus}")
    else()
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 90-virtual)
    endif()
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(RECYCLE_CUDA_STATUS "on (${CMAKE_CUDA_ARCHITECTURES})")
endif()

# -fmad=false: a multiplication and an addition are fused only where the source says fmaf. Otherwise the bits of a row
# would depend on what the compiler fuses in the kernel for one row and in the kernel for eight.
function(recycle_add_cuda)
  if(NOT RECYCLE_CUDA_FOUND)
    return()
  endif()
  set(kernels attention attention_decode device_info gate_up linear lm_head qkv recycle_head sampling select step)
  list(TRANSFORM kernels PREPEND csrc/cuda/)
  list(TRANSFORM kernels APPEND .cu)
  add_library(recycle_cuda SHARED ${kernels} csrc/common/plan.cpp csrc/bindings/cuda_ops.cpp)
  target_include_directories(recycle_cuda PRIVATE csrc/include csrc/cuda csrc/bindings)
  target_compile_options(recycle_cuda PRIVATE
    "$<$<COMPILE_LANGUAGE:CXX>:${RECYCLE_EXACT_FLAGS};-Wall;-Wextra>"
    $<$<COMPILE_LANGUAGE:CUDA>:-O3 -fmad=false --expt-relaxed-constexpr>)
  target_link_libraries(recycle_cuda PRIVATE recycle_torch CUDA::cudart_static ${CMAKE_DL_LIBS})
  set_target_properties(recycle_cuda PROPERTIES SKIP_BUILD_RPATH ON)
  install(TARGETS recycle_cuda LIBRARY DESTINATION recycle_ext)

  # `cmake --build BUILD --target cuda_resources` prints every kernel's registers and spills, and fails on a spill.
  add_custom_target(cuda_resources
    COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/cuda_resources.py ${CMAKE_CUDA_COMPILER}
    VERBATIM)
endfunction()
