// A model lowered to fused kernels: one step over packed tokens without leaving C++. Legend: T new tokens of all rows, B rows,
// D hidden size, N query heads, G KV heads, H head size, R rows of logits, V vocabulary.
#pragma once
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "binary.h"
#include "native/int8.h"
#include "native/native.h"
#include "workers.h"

namespace trimtab {

// Floats of every token [T, width], grown to the largest step seen and never shrunk.
struct Values {
    int64_t width = 0;
    bool logits = false;  // one row for each row of logits, not for each token
    float* data = nullptr;
};

// One forward pass as the caller describes it.
struct Step {
    int64_t tokens = 0, rows = 0, logits = 0;
    const int64_t* ids = nullptr;          // [T]
    const int64_t* starts = nullptr;       // [B + 1] offsets of each row's tokens
    const int64_t* past = nullptr;         // [B] tokens each row has in the cache
    const int64_t* logits_rows = nullptr;  // [R] tokens whose logits are wanted
    // [layers, B, record_heads, record_fields]: where the keys and values of a KV head lie that `attend_heads` reads and writes.
    //  0 k_pages, 1 v_pages, 2 k_sealed_pages, 3 v_sealed_pages: address of an array of page addresses by slot / page
    //  4 readable: slots that hold a token at the end of the pass
    //  5 k_sealed, 6 v_sealed: slots below are read from sealed pages
    //  7 k_sealed_after, 8 v_sealed_after: up to here slots are coded into sealed pages when the layer has attended
    //  9 channels: address of uint8 [width of sealed keys], the channels these keep, or 0
    // 10 positions: address of int32 positions by slot, or 0 where slots tell them
    // 11 chosen: address of int32 pieces that are read, ascending, or 0; 12 how many; 13 slots of one
    // 14 write: slot of the first new token
    // 15 bounds: address of bf16 [pieces, 2, H] by which a pass of one token chooses what it reads, 12 pieces of 13 slots; or 0
    const int64_t* records = nullptr;
    int64_t record_heads = 0;
    const int64_t* whole = nullptr;  // [B] how many of the last new tokens see everything a pattern would hide; null: none
};
constexpr int64_t record_fields = 16;

// A piece of attention work: queries of one row over keys of one KV head.
struct Piece {
    int64_t row, first_token, tokens, first_key, last_key, slot;  // slot: place of its partial sums, -1 if it sees all keys
    bool last_piece = true;                                       // no other piece has later keys for these queries
};

class Program;

constexpr int64_t alone = 2;  // tokens up to which every worker prepares an input for itself: cheaper than a barrier

// What a kernel sees of the step that runs.
struct Context {
    const Program& program;
    const Step& step;
    char* shared;             // scratch of all workers together
    char* own;                // scratch of each worker, own_bytes apart
    int64_t own_bytes;
    float* partial;           // partial sums of attention by slot and query head
    std::atomic<int64_t> next{0};  // job counter of the kernel that runs
    std::atomic<bool> lost{false};  // a key or value could not be coded
};

struct Kernel {
    std::string name;
    std::atomic<int64_t> weight_read{0}, kv_read{0}, kv_written{0}, flops{0};  // of the last step, all workers
    std::atomic<int64_t> active_rows{-1}, active_pairs{0};  // neurons some token needed, pairs of both; -1: not counted here
    std::atomic<int64_t> outliers{-1};                      // columns of the input apart from its int8 codes; -1: it has none
    double seconds = 0;  // of worker 0 in the last step, if timed
    virtual ~Kernel() = default;
    virtual int64_t scratch_bytes(int64_t /*tokens*/) const { return 0; }  // of all workers together
    virtual int64_t own_bytes(int64_t tokens) const { return scratch_bytes(tokens < alone ? tokens : alone); }  // of each
    virtual void prepare(const Step& /*step*/, int64_t /*watched*/) {}  // before a step
    virtual void run(Context& context, Worker& worker) = 0;
};

enum class Store : int { set, add, gated };

// Which kernel multiplies a tile with the T tokens of a step: one token after the other below `flat`, blocks of tokens that
// share what is read of the tile from there on, and from `decoded` on the tile as floats, decoded once for all tokens.
struct Dataflow {
    int64_t flat = 1, decoded = int64_t{1} << 40;
    bool decodes(int64_t tokens) const { return tokens >= decoded; }
};

struct Product {
    Tiles w;
    int input = 0;            // index of the inputs of its kernel
    int values = 0;           // where outputs go
    int64_t column = 0;       // first column there
    const float* bias = nullptr;
    float scale = 1, softcap = 0;
    Dataflow flow;
};

struct Rope {
    std::vector<float> inverse, inverse_long;  // frequencies; the long ones hold for rows that outgrow `original` tokens
    int64_t original = 0;
    float scale = 1;
    float* table = nullptr;  // cosines, then sines: [T, 2, half] of the step that runs
    int64_t half() const { return static_cast<int64_t>(inverse.size()); }
};

struct Attention {
    int layer = 0, qkv = 0, out = 0, rope = -1;  // qkv: queries, keys, values of a token side by side; rope -1: none
    int64_t heads = 0, kv_heads = 0, head_dim = 0, window = 0;             // window 0: none
    int64_t prompt_sink = 0, prompt_local = 0;  // what tokens of a longer pass see: the first and the last keys; local 0: all
    bool append = true;    // false: the cache holds the keys and values of the new tokens already
    bool has_q_norm = false, has_k_norm = false;
    Norm q_norm, k_norm;
    float scale = 1, softcap = 0;
    bool unified = false;  // one maximum phi for all keys; rows whose scores leave phi + [low, high] are computed again
    float phi = 0, low = 0, high = 0;
};

// How a KV head lies in pages: new tokens in landing pages, those that have been sealed in others, if it has such.
struct HeadForms {
    PageForm k_landing, v_landing, k_sealed, v_sealed;
    bool has_k_sealed = false, has_v_sealed = false;
    int64_t sink = 0, recent = 0;  // of a ring: what is neither among the first `sink` nor the last `recent` positions is hidden; recent 0: none
};

// The keys and values that a record tells of.
HeadView head_view(const int64_t* record, const HeadForms& forms);

// y += down_t (act(gate x) * up x), for passes of up to max_tokens only over neurons with |act(gate x)| > threshold.
struct GateFirstFFN {
    int source = 0, values = 0;
    Norm norm;
    Tiles gate;
    Matrix up, down_t;  // a neuron is one row of each
    Act act = Act::silu;
    float threshold = 0;
    int64_t max_tokens = 0;
    bool threshold_prefill = true;  // longer passes drop the same neurons, but read all rows
    Input gate_input;               // set by the program
};

class Program {
  public:
    explicit Program(int threads) : threads_(threads) {}

    int add_values(int64_t width, bool logits);
    int add_rope(Rope rope);
    void embed(const std::string& name, const Tiles& table, float scale, int values);
    void positions(const std::string& name, const Tiles& table, int64_t offset, int values);
    // Products of one input, which is normed first where there is a norm. gated: they come in pairs (gate, up). twice_from: see Input.
    void linear(const std::string& name, int source, const Norm* norm, std::vector<Product> products, Store store, Act act,
                float twice_from = -1);
    // The same with matrices of int8 rows, outlier columns apart.
    void int8_linear(const std::string& name, int source, const Norm* norm, std::vector<Int8Product> products, Outliers how,
                     Store store, Act act);
    // The same with sums of signs times powers of two.
    void binary_linear(const std::string& name, int source, const Norm* norm, std::optional<Rotation> rotation,
                       std::vector<BinaryProduct> products, Store store, Act act);
    void gate_first(const std::string& name, GateFirstFFN ffn);
    void norm_add(const std::string& name, int source, const Norm& norm, int values);
    // `forms` is by KV head.
    void attend_heads(const std::string& name, const Attention& attention, std::vector<HeadForms> forms);
    // Keeps the newest queries of every row and layer of `attend_heads` in each step.
    void watch(int64_t count) { watch_ = count; }
    // Keys in one piece of attention work of a single token; 0: by the number of keys.
    void split(int64_t keys) { split_ = keys; }

    // Runs one step; `reach` [B] is the length each row will have in the end, which chooses its rope. Throws std::invalid_argument
    // where a key or value could not be coded; what pages of coded tokens hold is then unknown. A step may be run in parts: the
    // kernels [first, end), an `end` below 0 being the last one's, all parts of one step after the other; records need to hold for
    // the kernels of a part alone.
    void run(const Step& step, const int64_t* reach, bool timed, int64_t first = 0, int64_t end = -1);
    // Runs one step on given values [T, width] instead of what an embedding yields, and copies out others.
    void run_on(const Step& step, int source, const float* x, int out, float* y);
    // Makes room for the values of a step, which then stay where they are while steps of this size run.
    void reserve(const Step& step) { lay_out(step); }
    // Runs one kernel alone.
    void run_one(const Step& step, size_t kernel);

    const Values& values(int index) const { return values_[static_cast<size_t>(index)]; }
    const Rope& rope(int index) const { return ropes_[static_cast<size_t>(index)]; }
    const std::vector<Piece>& pieces() const { return pieces_; }

    // Queries of a layer in the last step, rotated: [B, count, N, H], zeros in front where a row had fewer new tokens.
    struct Watched {
        const std::vector<float>* queries = nullptr;
        int64_t heads = 0, head_dim = 0;
    };
    // Behind the attention of each layer: where a step can be parted so that caches of one layer change before the next one runs.
    const std::vector<int64_t>& attends() const { return attends_; }
    const Watched& watched(int layer) const { return watched_.at(static_cast<size_t>(layer)); }
    int64_t watching() const { return watch_; }
    const std::vector<std::unique_ptr<Kernel>>& kernels() const { return kernels_; }
    int64_t arena_bytes() const;
    int threads() const { return threads_; }
    std::atomic<int64_t> recomputed{0};  // rows of attention computed again, since the program was built

  private:
    struct Arena {
        char* data = nullptr;
        int64_t bytes = 0;
        ~Arena();
        char* grow(int64_t wanted);  // contents are lost; std::bad_alloc if the system refuses
    };

    void lay_out(const Step& step);
    Context prepare(const Step& step, bool starts = true);
    void cut(const Step& step);
    void turn(const Step& step, const int64_t* reach, Worker& worker);

    int threads_;
    std::vector<Values> values_;
    std::vector<Rope> ropes_;
    std::vector<std::unique_ptr<Kernel>> kernels_;
    Arena values_arena_, scratch_arena_, partial_arena_, rope_arena_;
    int64_t split_ = 0, watch_ = 0;
    std::vector<Watched> watched_;  // by layer
    std::vector<int64_t> attends_;  // by layer
    int64_t heads_ = 0, per_kv_ = 0, head_dim_ = 0, slots_ = 0;  // largest over attention kernels
    std::vector<Piece> pieces_;
};

}  // namespace trimtab
