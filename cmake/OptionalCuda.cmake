# RECYCLE_CUDA=AUTO|ON|OFF. This version has no CUDA kernels: AUTO and OFF build for the CPU and say so,
# ON fails.
set(RECYCLE_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
if(NOT RECYCLE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "RECYCLE_CUDA is '${RECYCLE_CUDA}'; it must be AUTO, ON or OFF")
endif()
if(RECYCLE_CUDA STREQUAL ON)
  message(FATAL_ERROR "RECYCLE_CUDA=ON, but recycle_ext ${PROJECT_VERSION} has no CUDA kernels yet: a later "
    "version brings them; AUTO or OFF makes a CPU build")
endif()

find_program(_nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin NO_CACHE)
set(RECYCLE_CUDA_STATUS "off (this version has CPU kernels only)")
if(_nvcc)
  set(RECYCLE_CUDA_COMPILER "${_nvcc}, not used")
else()
  set(RECYCLE_CUDA_COMPILER "none found")
endif()
