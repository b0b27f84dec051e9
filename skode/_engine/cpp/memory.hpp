// Aligned arrays of zeros, and memory that only grows.
#pragma once

#include "vector.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace skode {

// Memory that solves leave behind for the next one: what the system hands out afresh
// costs a small solve more than its arithmetic does.
class Pool {
public:
  static void *take(std::size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex());
      auto &left = pieces()[bytes];
      if (!left.empty()) {
        void *piece = left.back();
        left.pop_back();
        kept() -= bytes;
        return piece;
      }
    }
    return ::operator new(bytes, std::align_val_t(64));
  }

  static void give(void *piece, std::size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex());
      if (kept() + bytes <= MOST) {
        pieces()[bytes].push_back(piece);
        kept() += bytes;
        return;
      }
    }
    ::operator delete(piece, std::align_val_t(64));
  }

private:
  static constexpr std::size_t MOST = std::size_t(1) << 24;
  // Never destroyed: a solve may outlive whatever the library destroys at exit.
  static std::mutex &mutex() {
    static auto *one = new std::mutex;
    return *one;
  }
  static std::map<std::size_t, std::vector<void *>> &pieces() {
    static auto *all = new std::map<std::size_t, std::vector<void *>>;
    return *all;
  }
  static std::size_t &kept() {
    static std::size_t bytes = 0;
    return bytes;
  }
};

template <class X> class Array {
public:
  Array() = default;
  explicit Array(std::size_t size)
      : data_(static_cast<X *>(Pool::take(size * sizeof(X))), Give{size * sizeof(X)}) {
    std::memset(static_cast<void *>(data_.get()), 0, size * sizeof(X));
  }
  X *data() { return data_.get(); }
  const X *data() const { return data_.get(); }
  X &operator[](std::size_t i) { return data_.get()[i]; }
  const X &operator[](std::size_t i) const { return data_.get()[i]; }

private:
  struct Give {
    std::size_t bytes = 0;
    void operator()(X *x) const { Pool::give(x, bytes); }
  };
  std::unique_ptr<X, Give> data_;
};

// Pieces of one size, never moved, freed together.
class Arena {
public:
  explicit Arena(std::size_t piece) : piece_((piece + 7) / 8 * 8) {}

  void *take() {
    if (left_ < piece_) {
      // Blocks grow with what is in use: few of them, and little of them empty.
      const std::size_t block =
          std::max(piece_ * 16, std::min(total_ / 4, std::size_t(1) << 24));
      blocks_.emplace_back(new char[block]);
      next_ = blocks_.back().get();
      left_ = block;
      total_ += block;
    }
    void *taken = next_;
    next_ += piece_;
    left_ -= piece_;
    return taken;
  }

private:
  std::size_t piece_, left_ = 0, total_ = 0;
  char *next_ = nullptr;
  std::vector<std::unique_ptr<char[]>> blocks_;
};

} // namespace skode
