// Memory of weights, specdec::in_huge_pages, and of results.
#pragma once

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vectors.h"

namespace {

// Memory that several tensors share; in pages of 2 MB where Linux gives them.
struct Chunk {
  static constexpr size_t PAGE = 1 << 21, SIZE = 1 << 25;
  size_t size, used = 0;
  char* memory;

  explicit Chunk(size_t bytes) : size((std::max(bytes, SIZE) + PAGE - 1) / PAGE * PAGE) {
    memory = static_cast<char*>(std::aligned_alloc(PAGE, size));
    TORCH_CHECK(memory, "in_huge_pages: no memory for ", size, " bytes");
#if defined(MADV_HUGEPAGE)
    madvise(memory, size, MADV_HUGEPAGE);  // where this fails, the pages are small ones
#endif
  }
  ~Chunk() { std::free(memory); }
  Chunk(const Chunk&) = delete;
};

// A contiguous copy of x. A step reads all weights once, and with pages of 4 KB looking up their addresses limits it.
// Tensors share chunks, so that small ones are in large pages too; a chunk lives as long as one of its tensors.
Tensor in_huge_pages(const Tensor& x) {
  constexpr size_t ALIGNMENT = 64;
  static std::mutex mutex;
  static std::weak_ptr<Chunk> last;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Chunk> chunk = last.lock();
  if (!chunk || chunk->size - chunk->used < x.nbytes()) last = chunk = std::make_shared<Chunk>(x.nbytes());
  char* at = chunk->memory + chunk->used;
  chunk->used = std::min(chunk->size, chunk->used + (x.nbytes() + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
  return at::from_blob(at, x.sizes(), [chunk](void*) {}, x.options()).copy_(x);
}

// Memory of small results. A forward makes a hundred of them, and the system's allocator takes longer than some of the
// operators. Blocks are kept by size and thread, up to KEPT of each, and never given back.
class SmallBlocks final : public c10::Allocator {
 public:
  static constexpr size_t ALIGNMENT = 64, SMALLEST = 6, LARGEST = 16, KEPT = 32;  // sizes: powers of two

  c10::DataPtr allocate(size_t bytes) override {
    size_t power = SMALLEST;
    while (size_t{1} << power < bytes) ++power;
    if (power > LARGEST) return c10::GetCPUAllocator()->allocate(bytes);
    std::vector<char*>& free = free_blocks()[power];
    char* block;
    if (free.empty()) {
      block = static_cast<char*>(std::aligned_alloc(ALIGNMENT, ALIGNMENT + (size_t{1} << power)));
      TORCH_CHECK(block, "no memory for ", bytes, " bytes");
      std::memcpy(block, &power, sizeof(power));  // before the data
    } else {
      block = free.back();
      free.pop_back();
    }
    return {block + ALIGNMENT, block, release, at::kCPU};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // a block begins before its data
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }

 private:
  static std::vector<char*>* free_blocks() {
    static thread_local auto* blocks = new std::vector<char*>[LARGEST + 1];  // outlives the thread's last tensor
    return blocks;
  }

  static void release(void* memory) {
    char* block = static_cast<char*>(memory);
    size_t power;
    std::memcpy(&power, block, sizeof(power));
    std::vector<char*>& free = free_blocks()[power];
    free.size() < KEPT ? free.push_back(block) : std::free(block);
  }
};

inline Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {  // without the dispatcher
  static SmallBlocks allocator;
  return at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

}  // namespace
