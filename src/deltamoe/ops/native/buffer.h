// Room for numbers, and how much of it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace {

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
class Buffer {  // uninitialised, aligned
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(aligned_alloc(64, up_to(size * sizeof(T) + 64, 64))), &free) {}
  operator T*() const { return data_.get(); }

 private:
  std::unique_ptr<T, void (*)(void*)> data_;
};

}  // namespace
