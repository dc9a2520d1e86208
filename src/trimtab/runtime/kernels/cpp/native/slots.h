// Physical memory under contiguous addresses: a slot is room for the longest sequence in each of some tensors, reserved once; pages
// are mapped into it as its sequence grows, and stay where they are. Source: Prabhu et al., vAttention, arXiv 2405.04437, sections 5 and 6.
//
// Pages are handed out in groups, one page of every tensor. Group g of tensor t is bytes [(t * ids + g) * page, ...) of one file in
// memory, which takes blocks only for groups that are in use: a slot takes groups with neighbouring numbers, so that what is mapped
// into it is one mapping of each tensor.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

namespace trimtab {

// The pool, the slots, the address space or the mappings of the process are used up. what() is a sentence.
class NoRoom : public std::bad_alloc {
  public:
    explicit NoRoom(std::string text) : text_(std::move(text)) {}
    const char* what() const noexcept override { return text_.c_str(); }

  private:
    std::string text_;
};

struct SlotForm {
    std::vector<int64_t> token_bytes;  // of each tensor, from one token to the next
    int64_t slots = 1, tokens = 1;     // sequences that have addresses at a time, and the longest one
    int64_t page = 4096;               // bytes, a multiple of the page of the system
    int64_t pool_groups = 1;           // most groups in use or kept
    bool background = true;            // map what the next steps need in a thread
    int64_t eager_steps = 10;          // how many steps ahead, ...
    int64_t eager_groups = 2;          // ... and the groups after which it stops
    bool deferred = true;              // groups of sequences that ended stay mapped
    bool whole = false;                // a slot is mapped whole as it is taken
    bool secure = false;               // groups of sequences that ended are zeroed before another one has them
};

struct SlotCounts {
    int64_t map_calls = 0;    // of the system, over all tensors
    int64_t unmap_calls = 0;
    int64_t copied_groups = 0;  // shared, and then written to by one of their sequences
    int64_t used_groups = 0;  // of sequences and of what is kept to come back to
    int64_t kept_groups = 0;  // mapped ahead, or left behind by a sequence
    int64_t mappings = 0;     // the process has now for the slots
    int64_t file_bytes = 0;   // blocks the system has given
    int64_t reserved_bytes = 0;  // of address space
};

class SlotMemory {
  public:
    explicit SlotMemory(const SlotForm& form);
    ~SlotMemory();
    SlotMemory(const SlotMemory&) = delete;
    SlotMemory& operator=(const SlotMemory&) = delete;

    // A sequence without tokens, and one that shares the first `tokens` of another until either writes. Neither has a slot before its
    // first step.
    int64_t open();
    int64_t fork(int64_t from, int64_t tokens);
    void close(int64_t seq);
    // Gives up what lies behind `tokens`.
    void cut(int64_t seq, int64_t tokens);

    // Makes tokens [first, end) of each sequence writable, and all before readable; then maps ahead in the background. Writes to
    // `found` [count, 2] the slot of each, and how many tokens have room from `first` on without another call.
    void step(const int64_t* seqs, const int64_t* first, const int64_t* end, int64_t count, int64_t* found);
    // Waits for the background.
    void settle();

    uint8_t* base(int64_t tensor) const { return bases_[static_cast<size_t>(tensor)]; }
    int64_t slot_bytes() const { return pages_ * form_.page; }
    int64_t tensors() const { return static_cast<int64_t>(form_.token_bytes.size()); }
    int64_t groups_of(int64_t tokens) const;
    SlotCounts counts();
    int64_t used_groups() {
        std::lock_guard<std::mutex> lock(mutex_);
        return used_;
    }

  private:
    struct Seq {
        int64_t slot = -1;
        bool live = false;
        std::vector<int32_t> groups;
    };
    struct Slot {
        int64_t seq = -1;
        std::vector<int32_t> mapped;  // group by page; -1: none
        std::vector<uint8_t> locked, stale;  // mapped for reading only; written by a sequence that ended
    };
    struct Change {
        int64_t page;
        int32_t group;
        bool locked, fresh;
    };

    Seq& seq(int64_t id);
    int64_t make();
    void grow(Seq& s, int64_t id, int64_t first, int64_t end);
    int64_t take_slot(int64_t id, int64_t need);
    int32_t take_group(int64_t near);
    void reclaim(int64_t groups);
    bool reclaim_one(int64_t slot, int64_t from);
    void leave(Seq& s, int64_t from);
    void map(int64_t slot, std::vector<Change>& changes);
    void unmap(int64_t slot, int64_t first, int64_t end);
    void punch(int32_t group);
    void ahead();
    void work();
    int64_t room(const Seq& s, int64_t first) const;
    uint8_t* at(int64_t tensor, int64_t slot, int64_t page) const { return base(tensor) + (slot * pages_ + page) * form_.page; }
    int64_t offset(int64_t tensor, int32_t group) const { return (tensor * ids_ + group) * form_.page; }

    SlotForm form_;
    int64_t pages_ = 0, ids_ = 0, widest_ = 0;
    int file_ = -1;
    std::vector<uint8_t*> bases_;
    std::vector<Seq> seqs_;
    std::vector<int64_t> unused_;  // numbers of sequences that ended
    std::vector<Slot> slots_;
    std::vector<int32_t> owners_;  // sequences that have each group
    std::vector<uint8_t> backed_;  // the group has blocks
    int64_t committed_ = 0, used_ = 0, cursor_ = 0;
    SlotCounts counts_;

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::pair<int64_t, int64_t>> coming_;  // sequences and the tokens they are about to have
    bool asked_ = false, stop_ = false;
    std::thread thread_;
};

}  // namespace trimtab
