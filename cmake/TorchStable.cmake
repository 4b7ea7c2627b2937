# The target recycle_torch: headers and library of the installed torch, for the LibTorch Stable ABI.
#
# find_package(Torch) is not used: it requires CUDA if torch was built with it, and the Stable ABI needs nothing that
# it sets up. There is no RPATH: Python loads torch before recycle_ext._C, so the loader finds libtorch_cpu by its name.
set(RECYCLE_TORCH_DIR "" CACHE PATH "The installed package torch; empty: the one Python finds")
if(NOT RECYCLE_TORCH_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE RECYCLE_TORCH_DIR
    OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET)
endif()
if(NOT EXISTS "${RECYCLE_TORCH_DIR}/version.py")
  message(FATAL_ERROR "recycle_ext needs torch 2.10 or newer to build; none was found "
    "(RECYCLE_TORCH_DIR is '${RECYCLE_TORCH_DIR}')")
endif()
file(STRINGS ${RECYCLE_TORCH_DIR}/version.py _version REGEX "^__version__")
string(REGEX MATCH "[0-9]+\\.[0-9]+[^'\"]*" RECYCLE_TORCH_VERSION "${_version}")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" _torch_release "${RECYCLE_TORCH_VERSION}")
if(_torch_release VERSION_LESS 2.10)
  message(FATAL_ERROR "recycle_ext needs torch 2.10 or newer to build; "
    "${RECYCLE_TORCH_DIR} is ${RECYCLE_TORCH_VERSION}")
endif()

find_library(RECYCLE_TORCH_LIBRARY torch_cpu PATHS ${RECYCLE_TORCH_DIR}/lib
  NO_DEFAULT_PATH NO_CACHE REQUIRED)
add_library(recycle_torch INTERFACE)
target_include_directories(recycle_torch SYSTEM INTERFACE ${RECYCLE_TORCH_DIR}/include)
# The Stable ABI of torch 2.10, the oldest supported version.
target_compile_definitions(recycle_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(recycle_torch INTERFACE ${RECYCLE_TORCH_LIBRARY})
