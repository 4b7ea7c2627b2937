// Argument checks: each names the op, the argument, what was given and what is needed.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace recycle::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kAny = -1;

// Python sees std::invalid_argument as ValueError.
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    default:
      return "another dtype";
  }
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  bool first = true;
  for (const int64_t size : sizes) {
    text << (first ? "" : ", ");
    if (size == kAny)
      text << "any";
    else
      text << size;
    first = false;
  }
  text << "]";
  return text.str();
}

// Where a tensor must be: with the CPU, or on this GPU.
struct Place {
  int gpu = -1;

  bool has(const Tensor& tensor) const {
    return gpu < 0 ? tensor.is_cpu() : tensor.is_cuda() && tensor.get_device_index() == gpu;
  }
};

// A contiguous tensor of this dtype and shape (kAny: any size there).
inline void check(const char* op, const char* name, const Tensor& tensor, ScalarType type,
                  std::initializer_list<int64_t> shape, Place place = {}) {
  if (!place.has(tensor)) {
    if (place.gpu < 0) fail(op, name, " must be a CPU tensor");
    fail(op, name, " must be on the GPU of the other tensors, cuda:", place.gpu);
  }
  if (tensor.scalar_type() != type)
    fail(op, name, " is ", name_of(tensor.scalar_type()), "; it must be ", name_of(type));
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  if (same) {
    size_t i = 0;
    for (const int64_t size : shape) {
      same = same && (size == kAny || sizes[i] == size);
      ++i;
    }
  }
  if (!same) fail(op, name, " has shape ", shape_text(sizes), "; it must be ", shape_text(shape));
  if (!tensor.is_contiguous()) fail(op, name, " must be contiguous");
}

// The buffer of the packed weights, or of scratch: bytes at a cache line's boundary.
inline void check_bytes(const char* op, const char* name, const Tensor& tensor, int64_t least,
                        Place place = {}) {
  check(op, name, tensor, ScalarType::Byte, {kAny}, place);
  if (tensor.numel() < least) fail(op, name, " has ", tensor.numel(), " bytes; it needs ", least);
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 64 != 0)
    fail(op, name, " must begin at an address that is a multiple of 64 (fresh torch tensors do)");
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* const_data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? const_data<T>(*tensor) : nullptr;
}

}  // namespace recycle::bindings
