// Working memory of a kernel. For files compiled per instruction set.

#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace alignfast {
namespace {

template <class V>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<V*>(::operator new(static_cast<size_t>(count) * sizeof(V), ALIGNMENT))) {}
  ~Buffer() { ::operator delete(data_, ALIGNMENT); }
  Buffer(Buffer&& other) : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&&) = delete;

  operator V*() const { return data_; }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  V* data_;
};

}  // namespace
}  // namespace alignfast
