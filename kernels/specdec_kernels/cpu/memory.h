// Memory of weights: specdec::in_huge_pages.
#pragma once

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

}  // namespace
