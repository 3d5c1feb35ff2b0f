// Programs: the operations of a model in their order, run on the rows of a step by all threads.
//
// This is the library's C interface, as modelpack_engine/cpu/library.py declares it. Functions that
// fail return null or a number other than 0.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernels.hpp"
#include "packing.hpp"
#include "threads.hpp"

#include <sys/mman.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

using namespace modelpack;

namespace {

enum class Code : int32_t { EMBED, MULTIPLY, ROTATE, ATTEND, NORM, ADD, SELECT, SOFTCAP };
enum class Ending : int32_t { STORE, ADD, GATED };

constexpr int kLogits = -1;  // the output buffer that the caller of a step provides
constexpr size_t kHugePage = 2 << 20;

}  // namespace

extern "C" {

// One operation; which fields it uses is said in `Run`. Buffers are numbered.
struct Operation {
    int32_t code, input, output, ending;
    int32_t activation, rope, pool, cache;
    int32_t heads, kv_heads, dim, window;
    float scale, eps, softcap, unused;
    const Matrix* matrix[3];
    const float* bias[3];
    const float* norm;
    const float* second_norm;
    const float* sinks;
};

struct Rope {
    int32_t dims, traditional;
    float scale, unused;
    const float* frequencies;  // [dims / 2]
};

// `length` rows from `row` on, of a sequence with this block table.
struct Span {
    int32_t row, length;
    const int32_t* table;
};

struct Step {
    int32_t rows, spans, sampled, block_size;
    const int32_t *tokens, *positions, *slots, *sample_rows;
    const Span* span;
    uint8_t* const* pools;
    float* logits;  // [sampled][vocabulary]
};

}  // extern "C"

namespace {

#if defined(__x86_64__)
// Whether the processor has AMX for bfloat16, Linux lets this process use it, and the user asks for it:
// some virtual machines have it in name only, and programs crash there.
bool may_use_amx() {
    const char* asked = std::getenv("MODELPACK_AMX");
    if (!asked || std::strcmp(asked, "1")) return false;
    unsigned a, b, c, features;
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &features)) return false;
    if (!(features & bf16) || !(features & tile)) return false;
    constexpr int request_permission = 0x1023, tile_data = 18;  // as in Linux's asm/prctl.h
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

// The kernels that the processor can run, the best ones last.
std::vector<const Kernels*> usable_kernels() {
    std::vector<const Kernels*> found{kernels_portable()};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(kernels_avx2());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni")) {
        found.push_back(kernels_avx512());
        if (__builtin_cpu_supports("avx512bf16")) {
            found.push_back(kernels_avx512_bf16());
            if (may_use_amx()) found.push_back(kernels_amx());
        }
    }
#elif defined(__aarch64__)
    constexpr unsigned long dot_products = 1ul << 20, int8 = 1ul << 13, bf16 = 1ul << 14;  // Linux's asm/hwcap.h
    if (getauxval(AT_HWCAP) & dot_products) {
        found.push_back(kernels_neon_dot());
        if ((getauxval(AT_HWCAP2) & (int8 | bf16)) == (int8 | bf16)) found.push_back(kernels_neon_bf16());
    }
#endif
    return found;
}

const Kernels* kernels = usable_kernels().back();
int number_of_threads = 1;
std::atomic<Threads*> threads{nullptr};  // never freed: at exit, others may still run programs
std::mutex starting;

// The threads of this process, which are started if it was forked since.
Threads& pool() {
    if (Threads* found = threads.load(std::memory_order_acquire)) return *found;
    std::lock_guard<std::mutex> one(starting);
    if (!threads.load(std::memory_order_relaxed))
        threads.store(new Threads(number_of_threads), std::memory_order_release);
    return *threads.load(std::memory_order_relaxed);
}

struct Deleter {
    void operator()(void* data) const { std::free(data); }
};
template <class T> using Memory = std::unique_ptr<T[], Deleter>;

template <class T> Memory<T> allocate(size_t count) {
    void* data = nullptr;
    if (posix_memalign(&data, 64, std::max<size_t>(count * sizeof(T), 64))) throw std::bad_alloc();
    return Memory<T>((T*)data);
}

// Rows of activations in the forms that matrices read.
struct Converted {
    Memory<int8_t> codes;
    Memory<float> scales, sums, floats;
    Memory<uint16_t> halves;
    Converted(size_t rows, size_t columns)
        : codes(allocate<int8_t>(rows * columns * 2)), scales(allocate<float>(rows * columns / kGroup + 1)),
          sums(allocate<float>(rows * columns / 16 + 1)), floats(allocate<float>(rows * columns)),
          halves(allocate<uint16_t>(rows * columns)) {}
};

constexpr int kTiles = 4;  // of a matrix that a thread takes at a time, at most

struct Scratch {
    Converted row;  // a single row
    Memory<float> products, up;
    Memory<uint8_t> unpacked;
    Scratch(size_t rows, size_t columns)
        : row(1, columns), products(allocate<float>(rows * kTiles * kTile)),
          up(allocate<float>(rows * kTiles * kTile)), unpacked(allocate<uint8_t>(2 * columns * kTile)) {}
};

// Rows of a sequence whose queries of one head of keys attend together.
struct Group {
    const Span* span;
    int row, count;
};

struct Program {
    std::vector<Operation> operations;
    std::vector<Rope> ropes;
    std::vector<int> widths;
    std::vector<Memory<float>> buffers;
    int max_rows, together = kQueries;  // rows whose queries of one head of keys attend together
    Converted converted;
    std::vector<Scratch> scratch;
    std::vector<Memory<float>> turns;  // by rope: cosines and sines [rows][dims]
    std::vector<Work> phases;  // two for each operation, and one before them
    std::mutex running;

    Program(const Operation* first, int count, const Rope* rope, int num_ropes, const int32_t* width,
            int num_buffers, int rows, int most_columns)
        : operations(first, first + count), ropes(rope, rope + num_ropes), widths(width, width + num_buffers),
          max_rows(rows), converted(rows, most_columns), phases(2 * count + 1) {
        for (const Operation& o : operations)
            if (o.code == (int)Code::ATTEND)
                together = std::min(together, std::max(1, kQueries / (o.heads / o.kv_heads)));
        for (int w : widths) buffers.push_back(allocate<float>((size_t)rows * w));
        for (int i = 0; i < number_of_threads; i++) scratch.emplace_back(rows, most_columns);
        for (const Rope& r : ropes) turns.push_back(allocate<float>((size_t)rows * r.dims));
    }
};

// A step on one thread.
class Run {
  public:
    Run(Program& program, const Step& step, const std::vector<Group>& groups, int thread)
        : p_(program), step_(step), groups_(groups), own_(program.scratch[thread]) {}

    void run() {
        share(step_.rows, 1, [&](int row) {
            for (size_t i = 0; i < p_.ropes.size(); i++) turn(i, row);
        });
        int rows = step_.rows;
        for (const Operation& o : p_.operations) {
            switch ((Code)o.code) {
                case Code::EMBED: embed(o); break;
                case Code::MULTIPLY: multiply(o, rows); break;
                case Code::ROTATE: rotate(o); break;
                case Code::ATTEND: attend(o); break;
                case Code::SELECT:  // what follows has the sampled rows, but ATTEND those of its input
                    share(step_.sampled, 1, [&](int i) {
                        std::memcpy(at(o.output, i), at(o.input, step_.sample_rows[i]),
                                    sizeof(float) * p_.widths[o.input]);
                    });
                    rows = step_.sampled;
                    if (rows == 0) return;
                    break;
                case Code::NORM:
                    share(rows, 1, [&](int row) {
                        kernels->norm(at(o.input, row), o.norm, p_.widths[o.input], o.eps, at(o.output, row));
                    });
                    break;
                case Code::ADD:
                    share(rows, 1, [&](int row) {
                        float *to = at(o.output, row), *from = at(o.input, row);
                        for (int i = 0; i < p_.widths[o.output]; i++) to[i] += from[i] * o.scale;
                    });
                    break;
                case Code::SOFTCAP:
                    share(rows, 1, [&](int row) {
                        float* to = step_.logits + (size_t)row * o.dim;
                        for (int i = 0; i < o.dim; i++) to[i] = o.softcap * std::tanh(to[i] / o.softcap);
                    });
                    break;
            }
        }
    }

  private:
    Program& p_;
    const Step& step_;
    const std::vector<Group>& groups_;
    Scratch& own_;
    int phase_ = 0;

    float* at(int buffer, int row) { return p_.buffers[buffer].get() + (size_t)row * p_.widths[buffer]; }

    template <class Piece> void share(int count, int size, Piece work) {
        p_.phases[phase_++].share(count, size, work);
    }

    void turn(size_t index, int row) {
        const Rope& rope = p_.ropes[index];
        float* out = p_.turns[index].get() + (size_t)row * rope.dims;
        for (int i = 0; i < rope.dims / 2; i++) {
            const double angle = (double)step_.positions[row] * rope.frequencies[i];
            out[i] = (float)std::cos(angle) * rope.scale;
            out[rope.dims / 2 + i] = (float)std::sin(angle) * rope.scale;
        }
    }

    // output = row of matrix[0] by token, times `scale`
    void embed(const Operation& o) {
        share(step_.rows, 4, [&](int row) {
            float* out = at(o.output, row);
            kernels->row_of(*o.matrix[0], step_.tokens[row], out);
            if (o.scale != 1)
                for (int i = 0; i < o.matrix[0]->columns; i++) out[i] *= o.scale;
        });
    }

    void convert(const Operation& o, int row, Converted& to, int to_row) {
        const int n = o.matrix[0]->columns;
        const float* x = at(o.input, row);
        float* floats = to.floats.get() + (size_t)to_row * n;
        if (o.norm) {
            kernels->norm(x, o.norm, n, o.eps, floats);
            x = floats;
        }
        bool codes = false, halves = false, whole = false;
        for (const Matrix* m : o.matrix) {
            if (!m) continue;
            codes |= m->kind >= Kind::INT4;
            halves |= m->kind == Kind::BF16 && kernels->bfloat16;
            whole |= m->kind < Kind::BF16 || (m->kind == Kind::BF16 && !kernels->bfloat16);
        }
        if (codes)
            kernels->to_codes(x, n, to.codes.get() + (size_t)to_row * n * 2, to.scales.get() + (size_t)to_row * (n / kGroup),
                              to.sums.get() + (size_t)to_row * (n / 16));
        if (halves) kernels->to_bfloat16(x, n, to.halves.get() + (size_t)to_row * n);
        if (whole && x != floats) std::memcpy(floats, x, sizeof(float) * n);
    }

    // output = input (normed with `norm`) times up to three matrices, side by side; or added to
    // output, times `scale`; or the activation of matrix[0]'s part times matrix[1]'s.
    void multiply(const Operation& o, int rows) {
        const bool gated = o.ending == (int)Ending::GATED;
        // With many rows, few tiles at a time, so that all threads end at about the same time; with few
        // rows the time is that of reading weights, which is faster in longer pieces.
        const int size = rows < 32 ? kTiles : kernels->tiles;
        int starts[4] = {0};
        for (int i = 0; i < 3; i++)
            starts[i + 1] = starts[i] + (o.matrix[i] && !(gated && i) ? (o.matrix[i]->tiles + size - 1) / size : 0);
        Converted* from = &p_.converted;
        if (rows == 1) {  // every thread converts it: that takes less time than to wait
            from = &own_.row;
            if (p_.phases[phase_].left(starts[3])) convert(o, 0, *from, 0);
        } else {
            share(rows, 4, [&](int row) { convert(o, row, p_.converted, row); });
        }
        const Rows x{from->floats.get(), from->halves.get(), from->codes.get(), from->scales.get(), from->sums.get(),
                     o.matrix[0]->columns};
        share(starts[3], 1, [&](int piece) {
            int which = 0;
            while (piece >= starts[which + 1]) which++;
            const Matrix& m = *o.matrix[which];
            const int tile = (piece - starts[which]) * size, tiles = std::min(size, m.tiles - tile);
            int column = tile * kTile;
            const int stride = tiles * kTile, count = std::min(stride, m.rows - column);
            float* products = own_.products.get();
            const int later = tile + size * number_of_threads;
            const uint8_t* next = later + tiles > m.tiles ? nullptr : m.data + later * m.tile_bytes;
            const uint8_t* ups = gated ? o.matrix[1]->data + tile * o.matrix[1]->tile_bytes : next;
            kernels->multiply(m, tile, tiles, x, 0, rows, products, own_.unpacked.get(), ups);
            bias(o.bias[which], column, count, stride, rows, products);
            if (gated) {
                float* up = own_.up.get();
                kernels->multiply(*o.matrix[1], tile, tiles, x, 0, rows, up, own_.unpacked.get(), next);
                bias(o.bias[1], column, count, stride, rows, up);
                kernels->gated(products, up, rows * stride, o.activation, products);
            }
            for (int i = 0; i < which; i++) column += o.matrix[i]->rows;
            const bool logits = o.output == kLogits;
            kernels->finish(products, stride, count, rows, o.scale, o.ending == (int)Ending::ADD,
                            (logits ? step_.logits : at(o.output, 0)) + column, logits ? m.rows : p_.widths[o.output]);
        });
    }

    static void bias(const float* bias, int column, int count, int stride, int rows, float* products) {
        if (!bias) return;
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < count; i++) products[(size_t)row * stride + i] += bias[column + i];
    }

    static void rotate_head(const Rope& rope, const float* turns, float* x) {
        const int half = rope.dims / 2, step = rope.traditional ? 2 : 1, apart = rope.traditional ? 1 : half;
        float turned[kLargestHead];  // not in place: then the compiler may use vectors
        for (int i = 0; i < half; i++) {
            const float a = x[step * i], b = x[step * i + apart], c = turns[i], s = turns[half + i];
            turned[step * i] = a * c - b * s;
            turned[step * i + apart] = a * s + b * c;
        }
        std::memcpy(x, turned, sizeof(float) * rope.dims);
    }

    // input [heads + 2 * kv_heads][dim]: norm and rotate queries and keys, write keys and values
    void rotate(const Operation& o) {
        const int elements = o.cache == (int)Cache::F32 ? 4 : 2;
        const size_t part = (size_t)step_.block_size * o.dim * elements;
        share(step_.rows, 1, [&](int row) {
            float* heads = at(o.input, row);
            for (int h = 0; h < o.heads + o.kv_heads; h++) {
                float* x = heads + (size_t)h * o.dim;
                const float* norm = h < o.heads ? o.norm : o.second_norm;
                if (norm) kernels->norm(x, norm, o.dim, o.eps, x);
                if (o.rope >= 0) {
                    const Rope& rope = p_.ropes[o.rope];
                    rotate_head(rope, p_.turns[o.rope].get() + (size_t)row * rope.dims, x);
                }
            }
            const int slot = step_.slots[row], block = slot / step_.block_size, offset = slot % step_.block_size;
            uint8_t* pool = step_.pools[o.pool] + 2 * part * o.kv_heads * block;
            for (int h = 0; h < o.kv_heads; h++) {
                const float* key = heads + (size_t)(o.heads + h) * o.dim;
                const float* value = key + (size_t)o.kv_heads * o.dim;
                uint8_t* keys = pool + part * h + ((size_t)(offset / 16) * o.dim * 16 + offset % 16) * elements;
                uint8_t* values = pool + part * (o.kv_heads + h) + (size_t)offset * o.dim * elements;
                if (o.cache == (int)Cache::BF16) {
                    uint16_t halves[kLargestHead];
                    kernels->to_bfloat16(key, o.dim, halves);
                    for (int d = 0; d < o.dim; d++) std::memcpy(keys + (size_t)d * 16 * 2, halves + d, 2);
                    kernels->to_bfloat16(value, o.dim, (uint16_t*)values);
                    continue;
                }
                for (int d = 0; d < o.dim; d++) {
                    put(o.cache, keys + (size_t)d * 16 * elements, key[d]);
                    put(o.cache, values + (size_t)d * elements, value[d]);
                }
            }
        });
    }

    static void put(int cache, uint8_t* to, float value) {
        if (cache == (int)Cache::F32) {
            std::memcpy(to, &value, 4);
            return;
        }
        const uint16_t bits = float_to_half(value);
        std::memcpy(to, &bits, 2);
    }

    void attend(const Operation& o) {
        const int shared = o.heads / o.kv_heads;
        share((int)groups_.size() * o.kv_heads, 1, [&](int piece) {
            const Group& group = groups_[piece / o.kv_heads];
            const int head = piece % o.kv_heads, count = group.count * shared;
            const int most = 5 * kQueries;
            alignas(64) float queries[most * kLargestHead], output[most * kLargestHead];
            int32_t first[most], length[most];
            float sinks[most];
            for (int from = 0; from < count; from += most) {
                const int some = std::min(most, count - from);
                for (int i = 0; i < some; i++) {
                    const int row = group.row + (from + i) / shared, h = head * shared + (from + i) % shared;
                    std::memcpy(queries + (size_t)i * o.dim, at(o.input, row) + (size_t)h * o.dim, sizeof(float) * o.dim);
                    length[i] = step_.positions[row] + 1;
                    first[i] = o.window > 0 ? std::max(0, length[i] - o.window) : 0;
                    if (o.sinks) sinks[i] = o.sinks[h];
                }
                kernels->attend({queries, output, some, o.dim, o.dim, first, length, group.span->table,
                                 step_.block_size, step_.pools[o.pool], o.kv_heads, head, (Cache)o.cache, o.scale,
                                 o.softcap, o.sinks ? sinks : nullptr});
                for (int i = 0; i < some; i++) {
                    const int row = group.row + (from + i) / shared, h = head * shared + (from + i) % shared;
                    std::memcpy(at(o.output, row) + (size_t)h * o.dim, output + (size_t)i * o.dim, sizeof(float) * o.dim);
                }
            }
        });
    }
};

// Return a matrix whose tiles are written by `pack`, or null without memory.
template <class Pack> Matrix* new_matrix(Kind kind, int rows, int columns, Pack pack) {
    const int tiles = (rows + kTile - 1) / kTile;
    auto* matrix = new (std::nothrow) Matrix{kind, rows, columns, tiles, tile_bytes(kind, columns), nullptr};
    void* memory = nullptr;
    const size_t bytes = matrix ? matrix->tile_bytes * tiles : 0, whole = bytes / kHugePage * kHugePage;
    if (!matrix || posix_memalign(&memory, whole ? kHugePage : 64, bytes)) {
        delete matrix;
        return nullptr;
    }
    if (whole) madvise(memory, whole, MADV_HUGEPAGE);  // if it fails, there are more faults
    matrix->data = (uint8_t*)memory;
    std::atomic<int> next{0};
    pool().run([&](int) {
        for (int tile; (tile = next.fetch_add(1)) < tiles;) pack(*matrix, tile);
    });
    return matrix;
}

}  // namespace

extern "C" {

// Start `count` threads, once for a process; return the number of threads.
int mp_start(int count) {
    if (!threads) {
        number_of_threads = std::max(1, count);
        pthread_atfork(nullptr, nullptr, [] { threads = nullptr; });  // a child has none of them
    }
    return pool().count();
}

const char* mp_kernels() { return kernels->name; }

// Use the kernels of this name, for tests; fails if the processor cannot run them.
int mp_use_kernels(const char* name) {
    for (const Kernels* found : usable_kernels())
        if (!std::strcmp(found->name, name)) {
            kernels = found;
            return 0;
        }
    return 1;
}

// Pack `size` bytes of rows; fails if these are not the bytes of such a matrix.
void* mp_matrix_new(int source, int rows, int columns, const uint8_t* data, size_t size) {
    Kind kind;
    if (rows <= 0 || !kind_of((Source)source, columns, &kind)) return nullptr;
    if (size != row_bytes((Source)source, columns) * rows) return nullptr;
    return new_matrix(kind, rows, columns, [=](const Matrix& matrix, int tile) {
        pack_tile(matrix, (Source)source, data, tile);
    });
}

// Pack MLX's affine codes, of `size` bytes; `scale_size` bytes of scales and of biases have the layout
// `type`. Fails if these are not the bytes of such a matrix.
void* mp_matrix_new_affine(int bits, int group, int type, int rows, int columns, const uint8_t* codes, size_t size,
                           const uint8_t* scales, const uint8_t* biases, size_t scale_size) {
    const Affine from{bits, group, (Source)type, codes, scales, biases};
    Kind kind;
    if (rows <= 0 || !kind_of(from, columns, &kind)) return nullptr;
    if (size != (size_t)rows * (columns / kGroup) * bits * 4) return nullptr;
    if (scale_size != (size_t)rows * (columns / group) * row_bytes((Source)type, 1)) return nullptr;
    return new_matrix(kind, rows, columns, [=](const Matrix& matrix, int tile) { pack_tile(matrix, from, tile); });
}

size_t mp_matrix_bytes(const void* matrix) {
    return ((const Matrix*)matrix)->tile_bytes * ((const Matrix*)matrix)->tiles;
}

// Write a row as floats [columns].
void mp_matrix_row(const void* matrix, int row, float* out) { kernels->row_of(*(const Matrix*)matrix, row, out); }

void mp_matrix_free(void* matrix) {
    std::free(((Matrix*)matrix)->data);
    delete (Matrix*)matrix;
}

void* mp_program_new(const Operation* operations, int count, const Rope* ropes, int num_ropes, const int32_t* widths,
                     int num_buffers, int rows, int columns) {
    if (count < 0 || num_ropes < 0 || num_buffers < 0 || rows < 1 || columns < 1) return nullptr;
    for (int i = 0; i < count; i++) {
        const Operation& o = operations[i];
        const bool heads = o.code == (int)Code::ROTATE || o.code == (int)Code::ATTEND;
        if (heads && (o.kv_heads < 1 || o.heads % o.kv_heads || o.dim % 16 || o.dim < 16 || o.dim > kLargestHead))
            return nullptr;
        if (o.code != (int)Code::ROTATE || o.rope < 0) continue;
        const int dims = o.rope < num_ropes ? ropes[o.rope].dims : -1;
        if (dims < 0 || dims % 2 || dims > o.dim) return nullptr;
    }
    try {
        return new Program(operations, count, ropes, num_ropes, widths, num_buffers, rows, columns);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void mp_program_free(void* program) { delete (Program*)program; }

int mp_program_run(void* pointer, const Step* step) {
    Program& program = *(Program*)pointer;
    std::lock_guard<std::mutex> one(program.running);
    if (step->rows < 1 || step->rows > program.max_rows || step->sampled > program.max_rows) return 1;
    std::vector<Group> groups;
    for (int i = 0; i < step->spans; i++)
        for (int row = 0; row < step->span[i].length; row += program.together)
            groups.push_back({&step->span[i], step->span[i].row + row, std::min(program.together, step->span[i].length - row)});
    for (Work& phase : program.phases) phase.reset();
    pool().run([&](int thread) { Run(program, *step, groups, thread).run(); });
    return 0;
}

}  // extern "C"
