// Runs kernel bodies on the host. Arrays are given, or come from and go to files. The lanes of a
// threadgroup take turns in one thread, each with a stack of its own, and change at barriers. With
// PA_THREADS, for the sanitizers, they are threads.
#include <pthread.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

typedef _Float16 float16_t;

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  explicit operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

struct Emu;
thread_local Emu* pa_emu;

// What all lanes run, each with its number. No containers of C++'s library here or below: they
// would take most of a program's time to compile.
struct Body {
  void (*call)(void* what, int thread);
  void* what;
};

#ifdef PA_THREADS
struct Barrier {
  pthread_barrier_t inner;
  explicit Barrier(int threads) { pthread_barrier_init(&inner, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&inner); }
  void wait() { pthread_barrier_wait(&inner); }
};

struct Lane {
  pthread_t running;
  Body body;
  int thread;
  static void* start(void* self) {
    const Lane* lane = (Lane*)self;
    lane->body.call(lane->body.what, lane->thread);
    return nullptr;
  }
};

inline void run(int threads, Body body) {
  Lane* lanes = new Lane[threads];
  for (int i = 0; i < threads; i++) {
    lanes[i].body = body;
    lanes[i].thread = i;
    if (pthread_create(&lanes[i].running, nullptr, Lane::start, &lanes[i])) std::abort();
  }
  for (int i = 0; i < threads; i++) pthread_join(lanes[i].running, nullptr);
  delete[] lanes;
}
#else
struct Lane {
  ucontext_t start;
  jmp_buf at;
  bool started, done;
};
static Lane* lanes;
static Body lane_body;
static int lane_count, current, remaining;
static jmp_buf all_done;

// Goes on with the next lane that has not ended, where it waited.
[[noreturn]] inline void next_lane() {
  do current = (current + 1) % lane_count;
  while (lanes[current].done);
  Lane& lane = lanes[current];
  if (lane.started) _longjmp(lane.at, 1);
  lane.started = true;
  setcontext(&lane.start);
  std::abort();
}

inline void let_others_run() {
  Emu* const own = pa_emu;
  if (_setjmp(lanes[current].at) == 0) next_lane();
  pa_emu = own;
}

inline void whole_lane() {
  lane_body.call(lane_body.what, current);
  lanes[current].done = true;
  if (--remaining == 0) _longjmp(all_done, 1);
  next_lane();
}

inline void run(int threads, Body body) {
  const size_t size = 1 << 20;
  char* stacks = (char*)mmap(nullptr, size * threads, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) std::abort();
  lanes = new Lane[threads]();
  for (int thread = 0; thread < threads; thread++) {
    ucontext_t& start = lanes[thread].start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks + size * thread;
    start.uc_stack.ss_size = size;
    makecontext(&start, whole_lane, 0);
  }
  lane_body = body;
  lane_count = threads;
  current = threads - 1;
  remaining = threads;
  if (_setjmp(all_done) == 0) next_lane();
  munmap(stacks, size * threads);
  delete[] lanes;
}

struct Barrier {
  int threads, waiting = 0, turn = 0;
  explicit Barrier(int threads) : threads(threads) {}
  void wait() {
    const int own = turn;
    if (++waiting == threads) {
      waiting = 0;
      turn++;
    }
    while (turn == own) let_others_run();
  }
};
#endif

struct Simdgroup {
  Barrier barrier;
  Simdgroup() : barrier(32) {}
  float lanes[2][32];
};

struct Emu {
  int thread, threads, depth, x, y, z;
  Barrier* group;
  Simdgroup* simd;
  int turn = 0;
  void sync() { group->wait(); }
  // Two turns' values are kept, so one barrier is enough: nobody is two turns ahead of another.
  float exchange(float value, int mask) {
    float* lanes = simd->lanes[turn++ & 1];
    lanes[thread & 31] = value;
    simd->barrier.wait();
    return lanes[(thread & 31) ^ mask];
  }
};

struct Grid {
  int x, y, z, threads;
};

struct Launch {
  const Grid& grid;
  Barrier group;
  Simdgroup* simds;
};

template <class Kernel>
void launch(const Grid& grid, Kernel kernel) {
  struct Whole : Launch {
    Kernel kernel;
  } whole{{grid, Barrier(grid.threads), new Simdgroup[grid.threads / 32]}, kernel};
  const auto lane = [](void* what, int thread) {
    Whole& whole = *(Whole*)what;
    const Grid& grid = whole.grid;
    Emu emu{thread, grid.threads, grid.z, 0, 0, 0, &whole.group, &whole.simds[thread / 32]};
    for (emu.z = 0; emu.z < grid.z; emu.z++) {
      for (emu.y = 0; emu.y < grid.y; emu.y++) {
        for (emu.x = 0; emu.x < grid.x; emu.x++) {
          whole.kernel(emu);
          whole.group.wait();
        }
      }
    }
  };
  run(grid.threads, {lane, &whole});
  delete[] whole.simds;
}

// An array of the caller.
struct Given {
  char* data;
  int* shape;
  template <class E>
  E* as() { return reinterpret_cast<E*>(data); }
};

// An array in a file, in memory of its exact size; written back if it is an output.
struct Array {
  char path[4096];
  char* data;
  int* shape;
  size_t bytes;
  bool output;
  Array(const char* directory, const char* name, bool is_output) : output(is_output) {
    shape = (int*)read(directory, name, "shape");
    data = read(directory, name, "data");
  }
  Array(const Array&) = delete;
  ~Array() {
    if (output) {
      FILE* file = std::fopen(path, "wb");
      if (!file || std::fwrite(data, 1, bytes, file) != bytes) std::abort();
      std::fclose(file);
    }
    delete[] data;
    delete[] (char*)shape;
  }
  template <class E>
  E* as() { return reinterpret_cast<E*>(data); }

  char* read(const char* directory, const char* name, const char* what) {
    if (std::snprintf(path, sizeof path, "%s/%s.%s", directory, name, what) >= int(sizeof path)) std::exit(3);
    FILE* file = std::fopen(path, "rb");
    if (!file) std::exit(3);
    std::fseek(file, 0, SEEK_END);
    bytes = std::ftell(file);
    std::rewind(file);
    char* found = new char[bytes];
    if (std::fread(found, 1, bytes, file) != bytes) std::exit(3);
    std::fclose(file);
    return found;
  }
};
