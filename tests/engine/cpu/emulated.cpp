// One product by the library, for a processor that is emulated: reads weights and activations from
// stdin, writes the values of the weights, then the products.
//
//     emulated KERNELS SOURCE ROWS COLUMNS BYTES COUNT
#include <cstdio>

#include "program.cpp"

namespace {

template <class T> std::vector<T> read_all(size_t count) {
    std::vector<T> found(count);
    if (std::fread(found.data(), sizeof(T), count, stdin) != count) std::exit(3);
    return found;
}

void write_all(const std::vector<float>& values) {
    if (std::fwrite(values.data(), sizeof(float), values.size(), stdout) != values.size()) std::exit(4);
}

}  // namespace

int main(int, char** arguments) {
    if (mp_use_kernels(arguments[1])) return 2;
    const int source = std::atoi(arguments[2]), rows = std::atoi(arguments[3]), columns = std::atoi(arguments[4]);
    const int count = std::atoi(arguments[6]);
    const auto bytes = read_all<uint8_t>(std::atoi(arguments[5]));
    const auto activations = read_all<uint8_t>((size_t)count * columns * sizeof(float));
    mp_start(2);
    void* weights = mp_matrix_new(source, rows, columns, bytes.data(), bytes.size());
    void* x = mp_matrix_new((int)Source::F32, count, columns, activations.data(), activations.size());
    if (!weights || !x) return 5;
    std::vector<float> values((size_t)rows * columns), products((size_t)count * rows);
    for (int row = 0; row < rows; row++) mp_matrix_row(weights, row, values.data() + (size_t)row * columns);
    write_all(values);

    Operation operations[2] = {};
    for (Operation& operation : operations) operation.rope = -1, operation.scale = 1;
    operations[0].code = (int)Code::EMBED;
    operations[0].matrix[0] = (const Matrix*)x;
    operations[1].code = (int)Code::MULTIPLY;
    operations[1].output = kLogits;
    operations[1].matrix[0] = (const Matrix*)weights;
    void* program = mp_program_new(operations, 2, nullptr, 0, &columns, 1, count, columns);
    std::vector<int32_t> tokens(count), zeros(count);
    for (int i = 0; i < count; i++) tokens[i] = i;
    Step step = {};
    step.rows = step.sampled = count;
    step.block_size = 16;
    step.tokens = tokens.data();
    step.positions = step.slots = step.sample_rows = zeros.data();
    step.logits = products.data();
    if (!program || mp_program_run(program, &step)) return 6;
    write_all(products);
    std::fflush(stdout);
    std::_Exit(0);  // the threads of the library run until the process ends
}
