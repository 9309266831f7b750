// llama.cpp in a process of its own: a line of JSON in, a line of JSON out, token ids in and out.
//
//   {"op": "load", "name": N, "target": GGUF, "draft": GGUF or null, "threads": T, "rows": B, "context": C, "unified": bool}
//     -> {"bytes": of the weights that one forward of the target reads}
//   {"op": "generate", "name": N, "prompts": [[ids], ...], "new_tokens": n, "sampled": bool, "seed": s, "k": K or null,
//    "ngram": n or null}
//     -> {"ids", "seconds", "cpu_seconds", "steps", "accepted", "draft_s", "target_s"}
//   {"op": "quantize", "source": GGUF, "output": GGUF, "type": "Q4_0" | "Q4_K_M" | "Q8_0", "threads": T} -> {}
//   {"op": "linear", "type": "Q4_0" | "Q8_0", "in": C, "out": O, "rows": M, "threads": T}
//     -> {"seconds": of one product of M rows and a weight, "bytes": of the weight}
//
// The loop does the least that llama.cpp needs: the most likely id straight from the logits where nothing is sampled, no
// id is decoded twice, and all rows share a batch. Draft ids are verified as llama.cpp's own examples do: an id is kept
// where it is the one that the target chooses or draws. Ends of text are ignored.
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "gguf.h"
#include "llama.h"
#include "ngram-map.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unistd.h>
#include <vector>

using json = nlohmann::json;
using Ids = std::vector<llama_token>;

// The logger of common/ is not linked: without it, nothing else of common/ has to be compiled.
int common_log_get_verbosity_thold() { return -1; }
struct common_log * common_log_main() { return nullptr; }
void common_log_add(struct common_log *, enum ggml_log_level, const char *, ...) {}

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double cpu_now() {
    timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void check(bool ok, const std::string & what) {
    if (!ok) {
        throw std::runtime_error(what);
    }
}

// A model with its KV cache, and a batch that is filled and decoded again and again.
struct Decoder {
    llama_context * context;
    llama_batch batch;
    int vocab_size;

    Decoder(llama_model * model, int rows, int length, bool unified, int threads) {
        auto params = llama_context_default_params();
        params.n_ctx = rows * length;
        params.n_batch = rows * length;
        params.n_seq_max = rows;
        params.kv_unified = unified;
        params.n_threads = params.n_threads_batch = threads;
        params.no_perf = true;
        context = llama_init_from_model(model, params);
        check(context, "no context for the model");
        batch = llama_batch_init(rows * length, 0, 1);
        vocab_size = llama_vocab_n_tokens(llama_model_get_vocab(model));
    }
    Decoder(const Decoder &) = delete;

    ~Decoder() {
        llama_batch_free(batch);
        llama_free(context);
    }

    // Adds an id to the batch; its index there, by which its logits are found.
    int add(llama_token id, int position, int row, bool logits) {
        const int at = batch.n_tokens++;
        batch.token[at] = id;
        batch.pos[at] = position;
        batch.n_seq_id[at] = 1;
        batch.seq_id[at][0] = row;
        batch.logits[at] = logits;
        return at;
    }

    void decode() {
        const int status = llama_decode(context, batch);
        check(status == 0, "llama_decode returned " + std::to_string(status));
        batch.n_tokens = 0;
    }

    const float * logits(int at) { return llama_get_logits_ith(context, at); }
    llama_token most_likely(int at) { return std::max_element(logits(at), logits(at) + vocab_size) - logits(at); }
    void clear() { llama_memory_clear(llama_get_memory(context), false); }
    void keep(int row, int length) { llama_memory_seq_rm(llama_get_memory(context), row, length, -1); }
};

struct Pipeline {
    std::unique_ptr<Decoder> target, draft;
};

// How the target's next id is chosen from its logits.
struct Chooser {
    bool sampled;
    std::mt19937_64 random;
    std::vector<double> sums;

    llama_token operator()(Decoder & decoder, int at) {
        if (!sampled) {
            return decoder.most_likely(at);
        }
        const float * logits = decoder.logits(at);
        const float largest = *std::max_element(logits, logits + decoder.vocab_size);
        sums.resize(decoder.vocab_size);
        double sum = 0;
        for (int id = 0; id < decoder.vocab_size; ++id) {
            sums[id] = sum += std::exp(logits[id] - largest);
        }
        const double drawn = std::uniform_real_distribution<double>(0, sum)(random);
        return std::min<size_t>(std::upper_bound(sums.begin(), sums.end(), drawn) - sums.begin(), sums.size() - 1);
    }
};

struct Row {
    Ids text;      // the prompt and the new ids
    size_t end;    // its length when the row is finished
    int drafted_from = 0; // positions that the draft model's cache holds
    Ids draft;
    int first = 0; // index in the batch of the position that predicts the first draft id

    bool is_done() const { return text.size() >= end; }
    int most_drafted(int k) const { return std::min<int>(k, end - text.size() - 1); }
};

// Greedy draft ids of all rows, with one batch for each id; k at most, and fewer where a row ends.
static void draft_with_model(Decoder & decoder, std::vector<Row> & rows, int k) {
    std::vector<int> at(rows.size());
    for (size_t r = 0; r < rows.size(); ++r) {
        Row & row = rows[r];
        if (row.is_done() || row.most_drafted(k) < 1) {
            continue;
        }
        for (size_t i = row.drafted_from; i < row.text.size(); ++i) {
            at[r] = decoder.add(row.text[i], i, r, i + 1 == row.text.size());
        }
        row.drafted_from = row.text.size();
    }
    for (int i = 0; i < k && decoder.batch.n_tokens; ++i) {
        decoder.decode();
        for (size_t r = 0; r < rows.size(); ++r) {
            Row & row = rows[r];
            const int most = row.is_done() ? 0 : row.most_drafted(k);
            if ((int) row.draft.size() >= most) {
                continue;
            }
            row.draft.push_back(decoder.most_likely(at[r]));
            if ((int) row.draft.size() < most) {
                at[r] = decoder.add(row.draft.back(), row.drafted_from++, r, true);
            }
        }
    }
}

static void draft_by_lookup(std::vector<Row> & rows, int k, int ngram) {
    for (Row & row : rows) {
        if (row.is_done() || row.most_drafted(k) < 1) {
            continue;
        }
        const Ids before(row.text.begin(), row.text.end() - 1);
        const common_ngram_simple_config config = {(uint16_t) ngram, (uint16_t) k};
        row.draft = common_ngram_simple_draft(config, before, row.text.back());
        row.draft.resize(std::min<size_t>(row.draft.size(), row.most_drafted(k)));
    }
}

static json generate(Pipeline & pipeline, const json & request) {
    const auto prompts = request.at("prompts").get<std::vector<Ids>>();
    const int new_tokens = request.at("new_tokens");
    const int k = request.at("k").is_null() ? 0 : request.at("k").get<int>();
    const int ngram = request.at("ngram").is_null() ? 0 : request.at("ngram").get<int>();
    Chooser choose = {request.at("sampled"), std::mt19937_64(request.at("seed").get<uint64_t>()), {}};
    Decoder & target = *pipeline.target;
    target.clear();
    if (pipeline.draft) {
        pipeline.draft->clear();
    }
    int steps = 0, accepted = 0;
    double draft_s = 0, target_s = 0;

    const double started = now(), cpu_started = cpu_now();
    std::vector<Row> rows(prompts.size());
    for (size_t r = 0; r < rows.size(); ++r) {
        rows[r].text = prompts[r];
        rows[r].end = prompts[r].size() + new_tokens;
        for (size_t i = 0; i < prompts[r].size(); ++i) {
            rows[r].first = target.add(prompts[r][i], i, r, i + 1 == prompts[r].size());
        }
    }
    target.decode();
    for (Row & row : rows) {
        row.text.push_back(choose(target, row.first));
    }
    while (std::any_of(rows.begin(), rows.end(), [](const Row & row) { return !row.is_done(); })) {
        const double began = now();
        if (pipeline.draft) {
            draft_with_model(*pipeline.draft, rows, k);
        } else if (ngram) {
            draft_by_lookup(rows, k, ngram);
        }
        const double drafted = now();
        for (size_t r = 0; r < rows.size(); ++r) {
            Row & row = rows[r];
            if (row.is_done()) {
                continue;
            }
            row.first = target.add(row.text.back(), row.text.size() - 1, r, true);
            for (size_t i = 0; i < row.draft.size(); ++i) {
                target.add(row.draft[i], row.text.size() + i, r, true);
            }
        }
        target.decode();
        const double decoded = now();
        for (size_t r = 0; r < rows.size(); ++r) {
            Row & row = rows[r];
            if (row.is_done()) {
                continue;
            }
            for (size_t i = 0;; ++i) {
                row.text.push_back(choose(target, row.first + i));
                if (i == row.draft.size() || row.draft[i] != row.text.back()) {
                    accepted += i;
                    break;
                }
            }
            if (!row.draft.empty()) { // forget what was rejected
                target.keep(r, row.text.size() - 1);
                if (pipeline.draft) {
                    row.drafted_from = std::min<int>(row.drafted_from, row.text.size() - 1);
                    pipeline.draft->keep(r, row.drafted_from);
                }
                row.draft.clear();
            }
        }
        ++steps;
        draft_s += drafted - began;
        target_s += decoded - drafted;
    }
    const double seconds = now() - started, cpu_seconds = cpu_now() - cpu_started;

    std::vector<Ids> ids;
    for (size_t r = 0; r < rows.size(); ++r) {
        ids.emplace_back(rows[r].text.begin() + prompts[r].size(), rows[r].text.end());
    }
    return {{"ids", ids}, {"seconds", seconds}, {"cpu_seconds", cpu_seconds}, {"steps", steps},
            {"accepted", accepted}, {"draft_s", draft_s}, {"target_s", target_s}};
}

// Bytes of all tensors, without the embedding where the head is another one: of that a forward reads single rows.
static size_t forward_bytes(const std::string & path) {
    gguf_context * file = gguf_init_from_file(path.c_str(), {/*no_alloc*/ true, /*ctx*/ nullptr});
    check(file, "no GGUF: " + path);
    size_t bytes = 0;
    for (int64_t i = 0; i < gguf_get_n_tensors(file); ++i) {
        bytes += gguf_get_tensor_size(file, i);
    }
    if (gguf_find_tensor(file, "output.weight") >= 0) {
        bytes -= gguf_get_tensor_size(file, gguf_find_tensor(file, "token_embd.weight"));
    }
    gguf_free(file);
    return bytes;
}

static json quantize(const json & request) {
    const std::map<std::string, llama_ftype> types = {
        {"Q4_0", LLAMA_FTYPE_MOSTLY_Q4_0}, {"Q8_0", LLAMA_FTYPE_MOSTLY_Q8_0}, {"Q4_K_M", LLAMA_FTYPE_MOSTLY_Q4_K_M}};
    auto params = llama_model_quantize_default_params();
    params.ftype = types.at(request.at("type"));
    params.nthread = request.at("threads");
    const std::string source = request.at("source"), output = request.at("output");
    check(llama_model_quantize(source.c_str(), output.c_str(), &params) == 0, "cannot quantize " + source);
    return json::object();
}

// Products of float32 rows and one weight, which ggml repacks for this processor as it does when it loads a model.
struct Linear {
    ggml_backend_t backend;
    ggml_context * weights;
    ggml_tensor * weight;
    std::map<int64_t, ggml_cgraph *> products; // by rows

    Linear(ggml_backend_t backend, ggml_type type, int64_t in, int64_t out)
        : backend(backend), weights(ggml_init({ggml_tensor_overhead(), nullptr, /*no_alloc*/ true})),
          weight(ggml_new_tensor_2d(weights, type, in, out)) {
        check(ggml_backend_alloc_ctx_tensors_from_buft(weights, buffer_type()), "no buffer for the weight");
        const std::vector<float> values = normal(in * out);
        std::vector<char> quantized(ggml_nbytes(weight));
        ggml_quantize_chunk(type, values.data(), quantized.data(), 0, out, in, nullptr);
        ggml_backend_tensor_set(weight, quantized.data(), 0, quantized.size());
    }
    Linear(const Linear &) = delete;

    static std::vector<float> normal(int64_t count) {
        std::mt19937 random(0);
        std::normal_distribution<float> distribution;
        std::vector<float> values(count);
        std::generate(values.begin(), values.end(), [&] { return distribution(random); });
        return values;
    }

    // The first buffer type of the CPU that has a product with this weight: those that repack come before the plain one.
    ggml_backend_buffer_type_t buffer_type() {
        ggml_backend_dev_t cpu = ggml_backend_get_device(backend);
        const auto extra_types = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts");
        ggml_context * context = ggml_init({2 * ggml_tensor_overhead(), nullptr, /*no_alloc*/ true});
        ggml_tensor * product =
            ggml_mul_mat(context, weight, ggml_new_tensor_2d(context, GGML_TYPE_F32, weight->ne[0], 1));
        ggml_backend_buffer_type_t found = ggml_backend_cpu_buffer_type();
        for (auto * type = extra_types ? extra_types(cpu) : nullptr; type && *type; ++type) {
            weight->buffer = ggml_backend_buft_alloc_buffer(*type, 0);
            const bool is_supported = ggml_backend_dev_supports_op(cpu, product);
            ggml_backend_buffer_free(weight->buffer);
            weight->buffer = nullptr;
            if (is_supported) {
                found = *type;
                break;
            }
        }
        ggml_free(context);
        return found;
    }

    ggml_cgraph * product_of(int64_t rows) {
        ggml_cgraph *& graph = products[rows];
        if (!graph) {
            ggml_context * context =
                ggml_init({2 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, /*no_alloc*/ true});
            ggml_tensor * x = ggml_new_tensor_2d(context, GGML_TYPE_F32, weight->ne[0], rows);
            graph = ggml_new_graph(context);
            ggml_build_forward_expand(graph, ggml_mul_mat(context, weight, x));
            check(ggml_backend_alloc_ctx_tensors(context, backend), "no buffer for the rows");
            const std::vector<float> values = normal(ggml_nelements(x));
            ggml_backend_tensor_set(x, values.data(), 0, ggml_nbytes(x));
        }
        return graph;
    }

    void compute(int64_t rows) {
        check(ggml_backend_graph_compute(backend, product_of(rows)) == GGML_STATUS_SUCCESS, "no product");
    }
};

static json time_linear(const json & request) {
    static ggml_backend_t backend = ggml_backend_cpu_init();
    static std::map<std::string, std::unique_ptr<Linear>> linears;
    static Linear small(backend, GGML_TYPE_Q4_0, 256, 64);
    const std::string type = request.at("type");
    const int64_t in = request.at("in"), out = request.at("out"), rows = request.at("rows");
    check(type == "Q4_0" || type == "Q8_0", "no such type: " + type);
    auto & linear = linears[type + " " + std::to_string(in) + " " + std::to_string(out)];
    if (!linear) {
        linear = std::make_unique<Linear>(backend, type == "Q4_0" ? GGML_TYPE_Q4_0 : GGML_TYPE_Q8_0, in, out);
    }
    ggml_backend_cpu_set_n_threads(backend, request.at("threads"));
    if (!linear->products.count(rows)) { // allocates memory; later, a call before would leave the weight in a cache
        linear->compute(rows);
    }
    small.compute(1); // its threads are awake, as they are within a model
    const double started = now();
    linear->compute(rows);
    return {{"seconds", now() - started}, {"bytes", ggml_nbytes(linear->weight)}};
}

// All models and pipelines live as long as the process.
static std::map<std::string, llama_model *> models;
static std::map<std::string, Pipeline> pipelines;

static std::unique_ptr<Decoder> decoder(const json & path, const json & request) {
    if (path.is_null()) {
        return nullptr;
    }
    llama_model *& model = models[path];
    if (!model) {
        model = llama_model_load_from_file(path.get<std::string>().c_str(), llama_model_default_params());
        check(model, "cannot load " + path.get<std::string>());
    }
    return std::make_unique<Decoder>(
        model, request.at("rows"), request.at("context"), request.at("unified"), request.at("threads"));
}

static json load(const json & request) {
    Pipeline & pipeline = pipelines[request.at("name")];
    if (!pipeline.target) {
        pipeline.draft = decoder(request.at("draft"), request);
        pipeline.target = decoder(request.at("target"), request);
    }
    return {{"bytes", forward_bytes(request.at("target"))}};
}

static json answer_to(const json & request) {
    const std::string op = request.at("op");
    if (op == "load") {
        return load(request);
    }
    if (op == "quantize") {
        return quantize(request);
    }
    if (op == "linear") {
        return time_linear(request);
    }
    return generate(pipelines.at(request.at("name")), request);
}

int main() {
    FILE * answers = fdopen(dup(1), "w");
    dup2(2, 1); // what the library prints goes to the log
    llama_backend_init();
    std::string line;
    while (std::getline(std::cin, line)) {
        json answer;
        try {
            answer = answer_to(json::parse(line));
        } catch (const std::exception & error) { // the parent process raises it
            answer = {{"error", error.what()}};
        }
        fprintf(answers, "%s\n", answer.dump().c_str());
        fflush(answers);
    }
    return 0;
}
