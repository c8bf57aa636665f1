// The requests that run, in the order in which they were admitted.
#pragma once

#include <iterator>

#include "records.hpp"

namespace replay {

// A chain through the requests themselves, so that anybody can leave without a walk.
class Running {
  public:
    class Iterator {
      public:
        using iterator_category = std::input_iterator_tag;
        using value_type = State*;
        using difference_type = std::ptrdiff_t;
        using pointer = State* const*;
        using reference = State*;
        explicit Iterator(State* at) : at_(at) {}
        State* operator*() const { return at_; }
        Iterator& operator++() {
            at_ = at_->after;
            return *this;
        }
        bool operator==(const Iterator& o) const { return at_ == o.at_; }
        bool operator!=(const Iterator& o) const { return at_ != o.at_; }

      private:
        State* at_;
    };
    Iterator begin() const { return Iterator(first_); }
    Iterator end() const { return Iterator(nullptr); }

    Int size() const { return size_; }
    bool empty() const { return size_ == 0; }
    State* back() const { return last_; }

    void push_back(State* state) {
        state->seat = ++seats_;
        state->before = last_;
        state->after = nullptr;
        (last_ ? last_->after : first_) = state;
        last_ = state;
        ++size_;
    }
    void remove(State* state) {
        (state->before ? state->before->after : first_) = state->after;
        (state->after ? state->after->before : last_) = state->before;
        --size_;
    }

  private:
    State *first_ = nullptr, *last_ = nullptr;
    Int size_ = 0, seats_ = 0;
};

}  // namespace replay
