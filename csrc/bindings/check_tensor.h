// Checks of one argument. Each message names the op, the argument, what was given and what is needed.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstddef>
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
  return type == ScalarType::Float      ? "float32"
         : type == ScalarType::Double   ? "float64"
         : type == ScalarType::Half     ? "float16"
         : type == ScalarType::BFloat16 ? "bfloat16"
         : type == ScalarType::Long     ? "int64"
         : type == ScalarType::Int      ? "int32"
         : type == ScalarType::Char     ? "int8"
         : type == ScalarType::Byte     ? "uint8"
                                        : "another dtype";
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + (size == kAny ? "any" : std::to_string(size));
  return "[" + text + "]";
}

template <class T>
inline constexpr ScalarType kDtype = ScalarType::Byte;
template <>
inline constexpr ScalarType kDtype<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kDtype<int64_t> = ScalarType::Long;

// Checks the tensors of one op, and hands out their data. A null `gpu` is -1: the tensors are the CPU's.
struct Checker {
  using Shape = std::initializer_list<int64_t>;

  const char* op;
  int gpu = -1;

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    bindings::fail(op, parts...);
  }

  // A contiguous tensor of this dtype and shape (kAny: any size).
  void check(const char* name, const Tensor& tensor, ScalarType dtype, Shape shape) const {
    const bool is_here = gpu < 0 ? tensor.is_cpu() : tensor.is_cuda() && tensor.get_device_index() == gpu;
    if (!is_here && gpu < 0) fail(name, " must be a CPU tensor");
    if (!is_here) fail(name, " must be on the GPU of the other tensors, cuda:", gpu);
    if (tensor.scalar_type() != dtype)
      fail(name, " is ", name_of(tensor.scalar_type()), "; it must be ", name_of(dtype));
    const auto sizes = tensor.sizes();
    const bool same = std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end(),
                                 [](int64_t size, int64_t wanted) { return wanted == kAny || size == wanted; });
    if (!same) fail(name, " has shape ", shape_text(sizes), "; it must be ", shape_text(shape));
    if (!tensor.is_contiguous()) fail(name, " must be contiguous");
  }

  // The data of a checked tensor: read only, or writable.
  template <class T>
  const T* input(const char* name, const Tensor& tensor, Shape shape) const {
    check(name, tensor, kDtype<T>, shape);
    return static_cast<const T*>(tensor.const_data_ptr());
  }
  template <class T>
  T* output(const char* name, const Tensor& tensor, Shape shape) const {
    check(name, tensor, kDtype<T>, shape);
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
  // A vector of n floats, or null.
  const float* optional_vector(const char* name, const std::optional<Tensor>& tensor, int64_t n) const {
    return tensor.has_value() ? input<float>(name, *tensor, {n}) : nullptr;
  }
  // Packed weights, or scratch: at least `min_bytes`, aligned to a cache line.
  const std::byte* bytes(const char* name, const Tensor& tensor, int64_t min_bytes) const {
    const auto* data = input<std::byte>(name, tensor, {kAny});
    if (tensor.numel() < min_bytes) fail(name, " has ", tensor.numel(), " bytes; it needs ", min_bytes);
    return aligned(name, data);
  }
  template <class T>
  T* aligned(const char* name, T* data) const {
    if (reinterpret_cast<uintptr_t>(data) % 64 != 0)
      fail(name, " must begin at an address that is a multiple of 64 (fresh torch tensors do)");
    return data;
  }
};

// The data of a tensor that the op made itself.
template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace recycle::bindings
